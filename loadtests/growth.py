"""`python -m loadtests.growth`: what a decision costs as versions, rules, pending decisions and counted keys grow.

    python -m loadtests.growth                          # everything, up to a million of what waits
    python -m loadtests.growth --quick                  # the smallest sizes, one repetition
    python -m loadtests.growth --only pending --json growth.json --plots docs
    python -m loadtests.growth --from growth.json --plots docs       # draw again what was measured

Duty: start the servers of a series side by side, bring each to its size, measure them in turns, print tables, what is
promised of growth, and plots. What the sizes are stands in `growth_cases.py`.
Strategy: the same number of decisions everywhere, so that measuring changes sizes by as little as can be and by as much
for each; processor time, not throughput, so that other programs matter little.
Promise: as that of `bench.py`: servers are stopped whatever happens; exit code 0, 1 when something promised is missed
(never by a quick run), 2 when something could not be measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loadtests import bodies, closed_loop, plots, wrk
from loadtests.filling import fill
from loadtests.growth_cases import LOAD, Series, chosen
from loadtests.growth_figures import Growth, findings, growth_table
from loadtests.measuring import Settings, Watch, measure, settle, warm
from loadtests.networks import SMALL
from loadtests.options import add_place, read
from loadtests.report import verdicts_table
from loadtests.results import Row, Sample
from loadtests.servers import Running, running
from loadtests.workplace import Workplace, say, workplace

FULL = {"repetitions": 7, "decisions": 4096, "seconds": 2.0}
QUICK = {"repetitions": 1, "decisions": 512, "seconds": 1.0}
CONNECTIONS = LOAD.connections
REWARDS = 64  # in a request
WARM_S = 0.5
COMMAND = "python -m loadtests.growth"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="the smallest sizes, once: is everything in order?")
    made.add_argument("--only", action="append", default=[], metavar="SERIES", help="versions, rules, pending or keys")
    made.add_argument("--largest", type=int, metavar="N", help="no point beyond this size")
    made.add_argument("--repetitions", type=int, help=f"default {FULL['repetitions']}, quick {QUICK['repetitions']}")
    made.add_argument("--seconds", type=float, help=f"of wrk; default {FULL['seconds']:g}, quick {QUICK['seconds']:g}")
    made.add_argument(
        "--decisions", type=int, help=f"where they are counted; default {FULL['decisions']}, quick {QUICK['decisions']}"
    )
    made.add_argument("--plots", type=Path, metavar="FOLDER", help="draw each series there, as growth-SERIES.svg")
    made.add_argument("--from", dest="measured", type=Path, metavar="FILE", help="draw what --json has written")
    add_place(made, "where servers write: some 3 GB for a million of what waits")
    return made


def main(arguments: Sequence[str]) -> int:
    """Run. Gives the exit code."""
    options = read(parser(), arguments, FULL, QUICK)
    try:
        if options.plots:
            plots.find()
        wanted = chosen(options.only, quick=options.quick, largest=options.largest)
        if not options.measured and not all(series.counted for series, _ in wanted):
            wrk.find()
    except (ValueError, plots.PygalMissingError, wrk.WrkMissingError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if options.measured:
        document = json.loads(options.measured.read_text())
    else:
        with workplace(options.store, options.folder) as place:
            document = _measured(options, wanted, place)
    return _told(document, options)


def _measured(
    options: argparse.Namespace, wanted: Sequence[tuple[Series, list[int]]], place: Workplace
) -> dict[str, Any]:
    """Measure all series. Gives what `--json` writes."""
    rows: dict[str, Row] = {}
    failures = []
    for series, sizes in wanted:
        say(f"{series.kind}: {series.about}")
        try:
            _series(series, sizes, options, place, rows)
        except (RuntimeError, OSError) as error:
            failures.append(f"{series.kind}: {error}")
            say(f"{series.kind} could not be measured to its end: {error}")
    points = [{"name": row.name, "repetitions": [dict(sample) for sample in row.samples]} for row in rows.values()]
    told = {"command": _command(options), "quick": options.quick}
    return {"machine": place.about, **told, "rows": points, "failures": failures}


def _command(options: argparse.Namespace) -> str:
    """The command that measures the same again: without what says where things are written."""
    given = [f"--only {each}" for each in options.only] + [f"--{name} {getattr(options, name):g}" for name in FULL]
    given += ["--quick"] if options.quick else []
    given += [f"--largest {options.largest}"] if options.largest is not None else []
    return " ".join([COMMAND, *given, f"--store {options.store}"])


def _series(
    series: Series, sizes: Sequence[int], options: argparse.Namespace, place: Workplace, rows: dict[str, Row]
) -> None:
    settings = Settings(options.seconds, WARM_S, rate=0.0)
    with ExitStack() as stack:
        servers: dict[int, Running] = {}
        for size in sizes:
            folder = place.folder / f"{series.kind}-{size}"
            servers[size] = stack.enter_context(running(series.spec(size), folder / "server", place.cores))
            fill(servers[size], series, size, folder / "filled", say)
            warm(servers[size], _asking(series, size), CONNECTIONS, settings)
        for turn in range(options.repetitions):
            for size in sizes if turn % 2 == 0 else reversed(sizes):
                if series.counted:
                    sample = _counted(servers[size], series, size, options.decisions)
                else:
                    sample = measure(servers[size], series.entry(size), settings, place.folder)
                rows.setdefault(series.name(size), Row(series.name(size), COMMAND)).samples.append(sample)
                say(f"  {turn + 1}/{options.repetitions}  {series.name(size):<24} {sample['cpu_us']:>8.1f} µs")


def _asking(series: Series, size: int) -> bodies.Asking:
    """The same requests for every point; where keys are counted, for keys from all over them, as many everywhere."""
    if series.kind != "keys":
        return bodies.acts(SMALL)
    return bodies.acts(SMALL, keys=[f"k{i * size // bodies.DIFFERENT}" for i in range(bodies.DIFFERENT)])


def _counted(server: Running, series: Series, size: int, decisions: int) -> Sample:
    """Ask for so many decisions, and reward them where the series says so."""
    asked = _asking(series, size).requests()
    settle(server)
    watch = Watch(server)
    answers = closed_loop.ask(server.port, [asked[i % len(asked)] for i in range(decisions)], CONNECTIONS)
    figures = watch.costs(decisions)
    if refused := {answer.status for answer in answers} - {200}:
        raise RuntimeError(f"decisions were answered {sorted(refused)}")
    if series.rewarded:
        figures |= _rewarded(server, [json.loads(answer.body)["decision_id"] for answer in answers])
    return figures


def _rewarded(server: Running, ids: Sequence[str]) -> dict[str, float]:
    watch = Watch(server)
    answers = closed_loop.ask(server.port, bodies.rewards(ids, REWARDS).requests(), CONNECTIONS)
    costs = watch.costs(len(ids))
    if refused := [answer for answer in answers if answer.status != 202]:
        raise RuntimeError(f"rewards were answered {refused[0].status}: {refused[0].body[:500]!r}")
    return {"reward_us": costs["cpu_us"], "reward_store_us": costs["store_cpu_us"]}


def _told(document: dict[str, Any], options: argparse.Namespace) -> int:
    """Print, write and draw what was measured. Gives the exit code."""
    rows = {each["name"]: Row(each["name"], COMMAND, each["repetitions"]) for each in document["rows"]}
    found = []
    for series, _ in chosen(options.only):
        growth = Growth.of(series, sorted(int(name.split("/")[1]) for name in rows if series.owns(name)), rows)
        if not growth.points:
            continue
        found += findings(growth)
        say(f"\n{series.kind}: {series.about}\n\n{growth_table(growth)}")
        if options.plots:
            say(f"\n{plots.draw(growth, plots.caption(document), options.plots)}")
    say(f"\n{verdicts_table('growth', found)}\n\n    {document['command']}")
    if options.json and not options.measured:
        options.json.write_text(json.dumps(document | {"findings": [asdict(each) for each in found]}, indent=1) + "\n")
    if document["failures"]:
        return 2
    return int(not document["quick"] and any(each.reached is False for each in found))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
