"""`python -m loadtests.stages`: where the processor time of a decision goes, in microseconds by stage.

    python -m loadtests.stages                             # single requests, and batches of 1, 16 and 64
    python -m loadtests.stages --only c16 --seconds 30     # more samples of one load
    python -m loadtests.stages --json stages.json

Duty: start Surefoot, drive it with each load, first alone, then while py-spy samples it, and print a table.
Strategy: what a decision costs is measured without py-spy; where it goes, with it. Which function works for which stage
stands in `stage_map.py`.
Promise: the server is stopped whatever happens. Exit code 0, or 2 when something could not be measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess  # wrk is a program
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loadtests import measuring, processes, sampling, wrk
from loadtests.cases import SUREFOOT, Entry, Load
from loadtests.measuring import Settings
from loadtests.options import add_place, read
from loadtests.report import table
from loadtests.servers import Running, running
from loadtests.stage_map import OTHER, STAGES
from loadtests.workplace import Workplace, say, workplace

LOADS = (
    *(Load(f"c{connections}", connections=connections) for connections in (1, 16, 64)),
    *(Load(f"of-{rows}", connections=4, rows=rows) for rows in (1, 16, 64)),
)
FULL = {"seconds": 15.0, "warm_s": 1.0}
QUICK = {"seconds": 2.0, "warm_s": 0.3}
STORE = "Valkey, a process of its own"
LEAST_US = 0.05
LEAD_S = 10  # wrk is ended when py-spy has seen enough, which needs a moment to start


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m loadtests.stages", description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="two seconds of each: is everything in order?")
    made.add_argument("--only", action="append", default=[], metavar="LOAD", choices=[load.name for load in LOADS],
                      help=", ".join(load.name for load in LOADS))  # fmt: skip
    made.add_argument(
        "--seconds", type=float, help=f"of sampling; default {FULL['seconds']:g}, quick {QUICK['seconds']:g}"
    )
    made.add_argument("--warm-s", type=float, help="before each")
    made.add_argument("--rules", type=int, default=SUREFOOT.rules, help=f"default {SUREFOOT.rules}")
    add_place(made, "where the server writes")
    return made


def main(arguments: Sequence[str]) -> int:
    """Run. Gives the exit code."""
    options = read(parser(), arguments, FULL, QUICK)
    try:
        wrk.find()
        sampling.find()
    except (wrk.WrkMissingError, sampling.PySpyMissingError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    try:
        with workplace(options.store, options.folder) as place:
            loads = [load for load in LOADS if not options.only or load.name in options.only]
            found = _measured(loads, options, place)
    except (RuntimeError, OSError) as error:
        sys.stderr.write(f"the stages could not be measured: {error}\n")
        return 2
    say(f"\nµs of processor time for each decision, {options.rules} rules\n\n{stages_table(found)}")
    if options.json:
        options.json.write_text(json.dumps({"machine": place.about, "loads": found}, indent=1) + "\n")
    return 0


def _measured(loads: Sequence[Load], options: argparse.Namespace, place: Workplace) -> dict[str, dict[str, float]]:
    """Microseconds by stage, for each load."""
    settings = Settings(options.seconds, options.warm_s, rate=0.0)
    spec = replace(SUREFOOT, rules=options.rules)
    found = {}
    with running(spec, place.folder / "server", place.cores) as server:
        for load in loads:
            entry = Entry("stages", "surefoot", spec, load)
            cost = measuring.measure(server, entry, settings, place.folder)
            shares = sampling.shares(*_profile(server, entry, options.seconds, place.folder))
            found[load.name] = {name: share * cost["cpu_us"] for name, share in shares.items()}
            found[load.name][STORE] = cost["store_cpu_us"]
            say(f"  {load.name:<8} {cost['cpu_us']:>8.1f} µs, and Valkey {cost['store_cpu_us']:.1f} µs")
    return found


def _deciding(server: Running) -> int:
    """The process that decides: of the server's the one that has worked most."""
    started = [pid for pid in processes.tree(server.process.pid) if not processes.is_store(pid)]
    return max(started, key=lambda pid: processes.cpu_s([pid]))


def _profile(
    server: Running, entry: Entry, seconds: float, folder: Path
) -> tuple[sampling.Profile, dict[int, sampling.Busy]]:
    """Watch the process that decides while wrk drives it, then sample it."""
    worker = _deciding(server)
    asked = measuring.asking(entry)
    script = wrk.write_script(folder, asked.path, asked.headers, asked.bodies)
    driver = wrk.command(server.port, script, entry.load.connections, 2 * seconds + LEAD_S)
    with subprocess.Popen(driver, stdout=subprocess.DEVNULL) as driving:  # noqa: S603  our own command
        try:
            busy = sampling.watch(worker, seconds)
            return sampling.record(worker, seconds, folder / "samples.txt"), busy
        finally:
            driving.terminate()


def stages_table(found: dict[str, dict[str, float]]) -> str:
    """A line for each stage, a column for each load; what is in no stage's list stands last, by file."""
    known = [name for name, _ in STAGES]
    others = sorted({name for each in found.values() for name in each if name.startswith(OTHER)})
    lines: list[Sequence[str]] = [("stage", *found, "")]
    for name in [*known, *others]:
        values = [each.get(name, 0.0) for each in found.values()]
        if max(values, default=0.0) >= LEAST_US:
            lines.append((name, *(f"{value:.1f}" for value in values), ""))
    sums = [sum(value for name, value in each.items() if name != STORE) for each in found.values()]
    lines.append(("all of it", *(f"{value:.1f}" for value in sums), ""))
    lines.append((STORE, *(f"{each[STORE]:.1f}" for each in found.values()), ""))
    return table(lines)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
