"""`allowed_actions` in every kind of space: columns or ends, and complaints that name the element."""

from __future__ import annotations

import math
from typing import Any

import pytest

from policies.errors import InvalidField, SurefootError, UnknownAction
from policies.types import ActionSpec, Box, Choices
from service.allowed import read_allowed
from service.wire import AllowedBox

ONE = Choices((("hold", "up", "down"),))
TWO = Choices((("l", "r"), ("slow", "fast")), ("lane", "speed"))
BOX = Box((-1.0, -1.0), (1.0, 1.0))


@pytest.mark.parametrize(
    ("allowed", "action", "read"),
    [
        (None, ONE, None),
        (["up", 0], ONE, (1, 0)),
        ([], ONE, ()),
        ([["r"], None], TWO, (1, 2, 3)),
        ([[0, "r"], [1]], TWO, (0, 1, 3)),
        (AllowedBox([0.0, None], None), BOX, ((0.0, -math.inf), (math.inf, math.inf))),
        (AllowedBox(None, [None, 0.5]), BOX, ((-math.inf, -math.inf), (math.inf, 0.5))),
    ],
)
def test_what_is_allowed_is_read(allowed: Any, action: ActionSpec, read: object) -> None:
    assert read_allowed(allowed, action, "allowed_actions") == read


@pytest.mark.parametrize(
    ("allowed", "action", "error", "field"),
    [
        (["sideways"], ONE, UnknownAction, "allowed_actions[0]"),
        (AllowedBox([0.0], None), ONE, InvalidField, "allowed_actions"),
        (["l"], TWO, InvalidField, "allowed_actions"),
        (["l", "fast"], TWO, InvalidField, "allowed_actions[0]"),
        ([None, ["fast", "warp"]], TWO, UnknownAction, "allowed_actions[1][1]"),
        ([0.0, 1.0], BOX, InvalidField, "allowed_actions"),
        (AllowedBox(None, [1.0]), BOX, InvalidField, "allowed_actions.high"),
    ],
)
def test_what_cannot_be_read_is_named(allowed: Any, action: ActionSpec, error: type[SurefootError], field: str) -> None:
    with pytest.raises(error) as caught:
        read_allowed(allowed, action, "allowed_actions")
    assert caught.value.field == field
