"""Rows of the fault table against a whole service, at a size of seconds: every promise holds.

`python -m tests.faults` runs all rows at full size. Here several worlds run side by side, since a world mostly waits;
each test is one of them.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.report import Report, Row, Settings, table
from tests.faults.scenarios import ROWS
from tests.faults.skipping import Impossible

SIDE_BY_SIDE = 3
SEED = 20_261
CHOSEN = {f"{row.number}-{row.name}".replace(" ", "-"): row for row in ROWS if row.in_tests}


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Report]]]:
    """The reports of those rows that this run was asked for, by test id."""
    tests = [item for item in request.session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    wanted = [str(item.callspec.params["name"]) for item in tests if item.path == Path(__file__)]
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        yield {name: pool.submit(_run, CHOSEN[name]) for name in wanted}
        pool.shutdown(cancel_futures=True)


def _run(row: Row) -> Report:
    folder = Path(tempfile.mkdtemp(prefix="surefoot-faults-"))
    try:
        return row.run(Settings(folder, SEED, tier=row.tiers[-1]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("name", CHOSEN)
def test_every_promise_of_the_row_holds(reports: dict[str, Future[Report]], name: str) -> None:
    try:
        report = reports[name].result(300.0)
    except Impossible as reason:
        pytest.skip(str(reason))
    assert not report.failures, "\n" + table([report])
    assert report.verdict.acts.acknowledged > 0
