"""`python -m loadtests.bench`: what Surefoot costs, held against the least a server can cost and against FastAPI.

    python -m loadtests.bench                          # everything, about twenty minutes
    python -m loadtests.bench --quick                  # one short repetition of nearly everything, about two
    python -m loadtests.bench --targets --runs 3       # what targets ask for, in full, three times; five minutes each
    python -m loadtests.bench --only base --json out   # some rows, and all figures as JSON

Duty: start each server itself, on loopback, pinned to one core, drive it from another, print tables and targets. What
is measured stands in `cases.py`, what rows mean in docs/performance.md. It speaks HTTP, and imports nothing of the
service.
Promise: every server that was started is stopped, also after Ctrl-C and SIGTERM. The exit code is 0 when everything was
measured and no target was missed (a quick run only shows its targets), 1 when one was, 2 when something could not be
measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from loadtests import measuring, report, wrk
from loadtests.cases import PEERS, Entry, Group, Spec, chosen
from loadtests.measuring import Settings
from loadtests.options import add_place, read
from loadtests.processes import Cores
from loadtests.results import Row, Sample
from loadtests.servers import Running, interpreter, running
from loadtests.targets import ROWS, Verdict, verdicts
from loadtests.workplace import say, workplace

COLLECTOR = Spec("collector", "empty")  # answers to traces, on the driver's core
TIMES = ("seconds", "warm_s", "rate")
SAID = ("quick", "repetitions", "store", *TIMES)
FULL = {"repetitions": 5, "seconds": 3.0, "warm_s": 1.0}
QUICK = {"repetitions": 1, "seconds": 1.0, "warm_s": 0.3}


class Bench:
    """Runs groups, one after the other, and collects rows."""

    def __init__(self, options: argparse.Namespace, cores: Cores, folder: Path) -> None:
        self._options = options
        self._cores = cores
        self._folder = folder
        self._settings = Settings(options.seconds, options.warm_s, options.rate)
        self.rows: dict[str, Row] = {}
        self.failures: list[str] = []

    def run(self, groups: Sequence[Group]) -> None:
        """A group that cannot be measured is told, and the others go on."""
        for number, group in enumerate(groups):
            folder = self._folder / str(number)
            folder.mkdir()
            try:
                if group.entries[0].load.kind == "start":
                    self._start(group, folder)
                else:
                    self._compare(group, folder)
            except (RuntimeError, OSError) as error:
                self.failures.append(f"{group.name}: {error}")
                say(f"{group.name} could not be measured: {error}")

    def _compare(self, group: Group, folder: Path) -> None:
        """All servers of the group at once, the rows in turns, every second turn backwards."""
        with ExitStack() as stack:
            servers: dict[Spec, Running] = {}
            collector = stack.enter_context(self._collector(folder)) if _traced(group) else None
            for spec in dict.fromkeys(entry.spec for entry in group.entries):
                place = folder / f"server-{len(servers)}"
                port = collector.port if collector else None
                servers[spec] = stack.enter_context(running(spec, place, self._cores, port, self._options.peers))
            for turn in range(self._options.repetitions):
                for entry in group.entries if turn % 2 == 0 else reversed(group.entries):
                    self._note(entry, measuring.measure(servers[entry.spec], entry, self._settings, folder), turn)

    def _start(self, group: Group, folder: Path) -> None:
        """A new server in a new folder each time."""
        for turn in range(self._options.repetitions):
            for entry in group.entries:
                with running(entry.spec, folder / f"{entry.label}-{turn}", self._cores) as server:
                    self._note(entry, measuring.start_figures(server, entry, self._settings), turn)

    def _collector(self, folder: Path) -> Any:
        aside = Cores(self._cores.driver, self._cores.driver, self._cores.driver)
        return running(COLLECTOR, folder / "collector", aside)

    def _note(self, entry: Entry, sample: Sample, turn: int) -> None:
        row = self.rows.setdefault(entry.name, Row(entry.name, command(entry, self._options)))
        row.samples.append(sample)
        shown = f"{sample['per_s']:>10,.0f}/s" if "per_s" in sample else f"{sample['ready_s']:>10.2f} s"
        say(f"  {turn + 1}/{self._options.repetitions}  {entry.name:<32} {shown}")


def _traced(group: Group) -> bool:
    return any(entry.spec.tracing for entry in group.entries)


def _installed(peers: Path | None) -> list[str]:
    return [kind for kind in PEERS if peers is not None and interpreter(peers, kind).exists()]


def command(entry: Entry, options: argparse.Namespace) -> str:
    """The command that measures one row again, with what its ratios need beside it."""
    group, _, load = entry.name.split("/")
    given = [f"--{name.replace('_', '-')} {getattr(options, name):g}" for name in ("repetitions", *TIMES)]
    return " ".join(["python -m loadtests.bench", f"--only '{group}/*/{load}'", *given, f"--store {options.store}"])


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m loadtests.bench", description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="one short repetition: is everything in order?")
    made.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="a group, a row, or a pattern of rows"
    )
    made.add_argument("--targets", action="store_true", help="the rows that targets are about, and no others")
    made.add_argument("--runs", type=int, default=1, metavar="N", help="all of it so many times, one after the other")
    made.add_argument("--list", action="store_true", help="print the names of the rows, and measure nothing")
    made.add_argument("--repetitions", type=int, help=f"default {FULL['repetitions']}, quick {QUICK['repetitions']}")
    made.add_argument("--seconds", type=float, help=f"of each; default {FULL['seconds']:g}; wrk knows whole ones")
    made.add_argument("--warm-s", type=float, help=f"before each; default {FULL['warm_s']:g}")
    made.add_argument("--rate", type=float, default=500.0, help="requests a second of open loops; default 500")
    made.add_argument(
        "--peers", type=Path, metavar="FOLDER", help="with an environment for each peer that is installed"
    )
    add_place(made, "where servers write; node is about this disk")
    return made


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    options = read(parser(), arguments, FULL, QUICK)
    if options.targets:
        options.only += ROWS
    options.repetitions = int(options.repetitions)
    return options


def main(arguments: Sequence[str]) -> int:
    """Run. Gives the exit code."""
    options = read_options(arguments)
    try:
        groups = chosen(options.only, quick=options.quick, installed=_installed(options.peers))
        if options.list:
            say("\n".join(entry.name for group in groups for entry in group.entries))
            return 0
        if not groups:
            raise ValueError("what is named are peers that are not installed; --peers says where they are")
        if any(entry.load.kind in ("closed", "overload") for group in groups for entry in group.entries):
            wrk.find()
    except (ValueError, wrk.WrkMissingError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return _run(options, groups)


def _run(options: argparse.Namespace, groups: Sequence[Group]) -> int:
    """Measure, once or several times, and tell after each. Gives the exit code."""
    found: list[list[Verdict]] = []
    documents = []
    failed = False
    for run in range(options.runs):
        if options.runs > 1:
            say(f"run {run + 1} of {options.runs}")
        with workplace(options.store, options.folder) as place:
            bench = Bench(options, place.cores, place.folder)
            bench.run(groups)
        found.append(verdicts(bench.rows))
        say("\n" + report.tables(groups, bench.rows))
        say(report.verdicts_table("target", found[-1]) + "\n")
        about = place.about | {"options": {name: getattr(options, name) for name in SAID}}
        documents.append(report.document(about, groups, bench.rows, found[-1]) | {"failures": bench.failures})
        failed = failed or bool(bench.failures)
    if options.runs > 1:
        say(report.runs_table(found))
    if options.json:
        written = documents[0] if options.runs == 1 else {"runs": documents}
        options.json.write_text(json.dumps(written, indent=1) + "\n")
    if failed:
        return 2
    return int(not options.quick and any(each.reached is False for run in found for each in run))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
