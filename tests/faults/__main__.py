"""`python -m tests.faults`: every row at full size, and a table; exit code 1 when a promise did not hold.

--row N       only these rows (may be given several times)     --quick      at the size of the tests
--only NAME   only rows whose name holds this                  --tier node  in this tier, not in their own
--seed S      the chance of the run                            --out FILE   write the table there, too
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from tests.faults.oracle import Verdict
from tests.faults.report import Report, Row, Settings, table
from tests.faults.scenarios import ROWS
from tests.faults.skipping import Impossible


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--row", type=int, action="append")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 1_000_000)
    parser.add_argument("--tier", choices=("process", "node"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    wanted = parser.parse_args(arguments)
    _say(f"seed {wanted.seed}, {'quick' if wanted.quick else 'full'} size")
    rows = [row for row in ROWS if (wanted.row is None or row.number in wanted.row) and wanted.only in row.name]
    if not rows:
        parser.error(f"there are rows {sorted({row.number for row in ROWS})}")
    reports = [_run(row, tier, wanted.seed, not wanted.quick) for row in rows for tier in _tiers(row, wanted.tier)]
    _say(table(reports))
    if wanted.out is not None:
        wanted.out.write_text(table(reports) + "\n")
    failed = [report for report in reports if report.failures]
    for report in failed:
        _say(f"row {report.row}, {report.fault}: {'; '.join(report.failures)}")
    return 1 if failed else 0


def _tiers(row: Row, wanted: str | None) -> Sequence[str]:
    return row.tiers if wanted is None else (wanted,)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _run(row: Row, tier: str, seed: int, full: bool) -> Report:
    begun_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="surefoot-faults-") as folder:
        try:
            report = row.run(Settings(Path(folder), seed, full, tier))
        except Impossible as reason:
            report = Report(row.number, row.name, Verdict(), notes=[f"not run: {reason}"])
        except Exception as error:
            traceback.print_exc()
            report = Report(row.number, row.name, Verdict(), broken=[f"{type(error).__name__}: {str(error)[:5000]}"])
    _say("| " + " | ".join(report.cells()) + " |")
    state = "FAILED" if report.failures else "ok"
    _say(f"row {row.number}, {row.name} ({tier}): {state}, {time.monotonic() - begun_s:.0f} s")
    return report


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
