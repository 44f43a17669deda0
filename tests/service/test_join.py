"""The join as a table: what it allows, what the page shows, and the rules that are pure functions."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

import service
from service import redis_streams
from service.join import (
    BREAK_MS,
    OPEN,
    REWARDS_KEPT,
    TABLE,
    End,
    JoinConfig,
    Move,
    Next,
    State,
    Verdict,
    Why,
    diagram,
    ending,
    step,
    voids,
)
from tests.service.joining import decision, reward

ROOT = Path(service.__file__).parent.parent
PAGE = (ROOT / "docs" / "join.md").read_text()
SCRIPT = redis_streams.SCRIPT.decode()
FOLLOWING = Next("b", b"next", b"\1", "step")


def test_the_page_shows_the_table() -> None:
    (drawn,) = re.findall(r"```mermaid\n(stateDiagram.*?)\n```", PAGE, re.DOTALL)
    assert drawn == diagram()


def test_the_page_names_every_word_and_no_other() -> None:
    for kind, heading in ((Verdict, "verdict"), (Why, "why"), (End, "end")):
        (table,) = re.findall(rf"^\| {heading} \|.*?\n\n", PAGE, re.DOTALL | re.MULTILINE)
        named = set(re.findall(r"^\| `([a-z]+)` \|", table, re.MULTILINE))
        assert named == {each.word if isinstance(each, End) else str(each) for each in kind}


def test_the_script_has_the_tables_words_and_numbers() -> None:
    states = {str(state) for state in State if state not in OPEN}
    births = re.findall(r"births = \{(.*?)\}", SCRIPT)[0]
    assert set(re.findall(r"([a-z]+) = 0", births)) == states
    for word in [*Verdict, *Why, *(end.word for end in End)]:
        assert f"'{word}'" in SCRIPT
    assert f"BREAK_MS = {BREAK_MS} " in SCRIPT
    assert f"REWARDS_KEPT, LATE_TOLD = {REWARDS_KEPT}, " in SCRIPT


def test_the_page_names_every_field_of_the_streams() -> None:
    (table,) = re.findall(r"^\| field \|.*\Z", PAGE, re.DOTALL | re.MULTILINE)
    named = [
        word for line in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for word in re.findall(r"`(\w+)`", line)
    ]
    (born,) = re.findall(r":transitions', '\*', (.*?)\)\n", SCRIPT, re.DOTALL)
    assert sorted(named) == sorted(re.findall(r"'(\w+)', \S", born))
    starred = {
        word for line in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for word in re.findall(r"`(\w+)`\*", line)
    }
    for stream in ("late", "quarantined"):
        (aside,) = re.findall(rf":{stream}', '\*', (.*?)\)\n", SCRIPT)
        assert set(re.findall(r"'(\w+)', \S", aside)) - {"w", "ep"} == starred


@pytest.mark.parametrize(("state", "move"), list(itertools.product(State, Move)))
def test_a_pair_outside_the_table_raises(state: State, move: Move) -> None:
    if (state, move) in TABLE:
        assert step(state, move) is TABLE[state, move]
    else:
        with pytest.raises(ValueError, match=state.name):
            step(state, move)


def test_a_closed_decision_stays_as_it_is() -> None:
    """Exactly one transition for each decision: nothing leads out of a closed state."""
    for (before, _), after in TABLE.items():
        assert before in OPEN or after is before


def test_every_open_decision_can_meet_its_deadline() -> None:
    """What was collected comes to stand by then."""
    assert all(TABLE[state, Move.DEADLINE] not in OPEN for state in OPEN - {State.COLLECTING})
    assert TABLE[State.COLLECTING, Move.REWARD] is State.REWARDED


def test_the_only_bootstraps_have_a_next_state() -> None:
    assert {end.word for end in End if end.bootstrap} == {"none", "truncated"}


def test_how_a_rewarded_decision_ends() -> None:
    alone, playing = decision("a"), decision("a", "ep", 0)
    assert ending(alone, reward("a"), FOLLOWING) == (End.SINGLE, Next("", b"", b"", ""))
    assert ending(playing, reward("a"), FOLLOWING) == (End.NONE, FOLLOWING)
    assert ending(playing, reward("a"), None) is None
    sent = Next("", b"sent", b"", "reward")
    assert ending(playing, reward("a", sent=b"sent"), FOLLOWING) == (End.NONE, sent)
    assert ending(playing, reward("a", flags=2, sent=b"sent"), FOLLOWING) == (End.TRUNCATED, sent)
    assert ending(playing, reward("a", flags=1 + 2, sent=b"sent"), FOLLOWING) == (End.TERMINATED, sent)
    lost = ending(playing, reward("a", flags=2), FOLLOWING)
    assert lost is not None
    assert lost[0] is End.LOST
    assert lost[1].state == b""


def test_what_voids() -> None:
    assert voids(decision("a"), reward("a", flags=8))
    assert voids(decision("a"), reward("a", executed="0"))
    assert not voids(decision("a"), reward("a", executed="2"))
    assert not voids(decision("a"), reward("a"))


@pytest.mark.parametrize(
    "field", ["max_lag_ms", "sweep_limit", "record_ttl_ms", "successor_ttl_ms", "episode_ttl_ms", "n_step"]
)
def test_a_configuration_that_would_stop_the_script_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        JoinConfig(**{field: 0})  # type: ignore[arg-type]
