"""The document: what it refuses and by which name, what it means for leases, and its digest."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from policies.errors import InvalidField
from safety.burn import BurnLimit
from safety.exploration import Cap, Exploration, parse_exploration, read_exploration
from safety.schedule import Constant, Linear, Span

WHOLE = {
    "epsilon": {"kind": "linear", "start": 0.2, "end": 0.02, "over": {"decisions": 10_000}},
    "temperature": 2.0,
    "sigma": {"kind": "exponential", "start": 1.0, "end": 0.1, "half_life": {"seconds": 3600}},
    "rate": {"limit": 500, "window_s": 3600},
    "share": {"limit": 0.05, "window_s": 600},
    "regret": {"limit": 12.5, "window_s": 3600},
    "burn": {"rate": 0.1, "bad_reward": -5.0},
    "freeze": False,
    "when_frozen": "mode",
    "start": "now",
}


def test_a_whole_document_is_read() -> None:
    found = parse_exploration(WHOLE)
    assert found.epsilon == Linear(0.2, 0.02, Span(decisions=10_000))
    assert found.burn == BurnLimit(rate=0.1, bad_reward=-5.0)
    assert found.caps == (
        Cap("rate", 500, 3_600_000, 1),
        Cap("share", 0.05, 600_000, 1),
        Cap("regret", 12_500_000, 3_600_000, 1_000_000),
    )
    assert read_exploration(msgspec.json.encode(WHOLE)) == found
    assert read_exploration(msgspec.json.encode(found)) == found


def test_an_empty_document_caps_nothing_and_leaves_the_versions_own_strength() -> None:
    found = read_exploration(b"{}")
    assert found == Exploration()
    assert found.caps == ()
    assert found.wanted(0.07, 10**6, 1e6) == 0.07


def test_what_is_wanted() -> None:
    assert Exploration(epsilon=Constant(0.5)).wanted(0.1) == 0.5
    assert parse_exploration(WHOLE).wanted(0.1, 5_000) == pytest.approx(0.11)
    assert Exploration(epsilon=0.5, freeze=True).wanted(0.1) == 0.0


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({"epsilon": 1.5}, "exploration.epsilon"),
        ({"epsilon": "much"}, "exploration.epsilon"),
        ({"epsilon": {"kind": "linear", "start": 2.0, "end": 0.0, "over": {"decisions": 5}}}, "exploration.epsilon"),
        ({"epsilon": {"kind": "linear", "start": 1.0, "end": 0.0, "over": {}}}, "exploration.epsilon.over"),
        ({"temperature": 0.0}, "exploration.temperature"),
        ({"sigma": -1.0}, "exploration.sigma"),
        ({"rate": {"limit": -1, "window_s": 5}}, "exploration.rate.limit"),
        ({"share": {"limit": 1.1, "window_s": 5}}, "exploration.share.limit"),
        ({"regret": {"limit": 1.0, "window_s": 0}}, "exploration.regret.window_s"),
        ({"burn": {"rate": 0.5, "short_s": 100, "long_s": 50}}, "exploration.burn"),
        ({"when_frozen": "never"}, "exploration.when_frozen"),
        ({"budget": 5}, "exploration"),
        ([], "exploration"),
    ],
)
def test_what_is_wrong_is_named(document: Any, field: str) -> None:
    with pytest.raises(InvalidField) as refused:
        parse_exploration(document)
    assert refused.value.field == field
    with pytest.raises(InvalidField) as refused:
        read_exploration(msgspec.json.encode(document))
    assert refused.value.field == field


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(InvalidField):
        read_exploration(b"{")


def test_the_digest_is_of_the_meaning() -> None:
    backwards = dict(reversed(WHOLE.items()))
    assert parse_exploration(WHOLE).digest == parse_exploration(backwards).digest
    assert parse_exploration(WHOLE).digest != parse_exploration(WHOLE | {"freeze": True}).digest
    assert Exploration().digest == parse_exploration({"freeze": False}).digest


def test_schedules_begin_anew_only_when_they_change() -> None:
    before = parse_exploration(WHOLE).progress_of
    assert parse_exploration(WHOLE | {"rate": None, "freeze": True}).progress_of == before
    assert parse_exploration(WHOLE | {"epsilon": 0.1}).progress_of != before
