"""The points at which row 2 kills a worker stand for functions that are there."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from service import crew
from tests.faults.failing_worker import FUNCTIONS
from tests.faults.launcher import WORKER


@pytest.mark.parametrize(("point", "owner"), FUNCTIONS.items(), ids=str)
def test_every_point_exists(point: str, owner: Any) -> None:
    name, _, function = point.partition(".")
    assert owner.__name__ == name
    found = inspect.getattr_static(owner, function)
    assert callable(getattr(found, "__func__", found))


def test_the_supervisor_starts_the_worker_that_is_replaced() -> None:
    assert f'"{WORKER}"' in inspect.getsource(crew)
