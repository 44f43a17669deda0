"""Units and steps of the estimators against slow oracles: every action listed, every unit sorted out by hand."""

from __future__ import annotations

import itertools
import random
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.decision import action_text
from service.estimate_rows import Judging, Seen, own_step, said, seen, shadow_step
from service.estimate_units import Book, Complete, Units, height
from tests.service.estimated import CHAMPION, entry, record, score

CLOSED_MS, TIME_MS, WINDOW_MS = 60_000, 4_000, 1_000


def row(place: int, fields: dict[str, Any], with_state: bool = True) -> Seen:
    found = {
        name.encode(): value if isinstance(value, bytes) else str(value).encode() for name, value in fields.items()
    }
    return seen(f"{place + 1}-0".encode(), found, with_state)


# -- steps


def dirichlet(rng: np.random.Generator, n: int, zeros: bool) -> Any:
    """A distribution, of which some choices may have nothing."""
    weights = rng.random(n) * ((rng.random(n) < 0.6) if zeros else 1.0)
    weights[rng.integers(n)] += 0.5
    return weights / weights.sum()


@pytest.mark.parametrize("nvec", [(3,), (2, 3)])
@pytest.mark.parametrize("seed", range(60))
def test_steps_of_choices_are_what_listing_every_action_gives(nvec: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    own, explored, wanted = ([dirichlet(rng, n, zeros=True) for n in nvec] for _ in range(3))
    uniform = bool(rng.random() < 0.3)
    if uniform:
        explored = [np.full(n, 1.0 / n) for n in nvec]
    epsilon = float(rng.choice([0.0, 0.1, 0.7]))
    actions = list(itertools.product(*map(range, nvec)))

    def mass(factors: list[Any], action: tuple[int, ...]) -> float:
        return float(np.prod([each[a] for each, a in zip(factors, action, strict=True)]))

    behaviour = {a: (1 - epsilon) * mass(own, a) + epsilon * mass(explored, a) for a in actions}
    possible = [a for a in actions if behaviour[a] > 0.0]
    action = possible[rng.integers(len(possible))]
    recorded = record(
        epsilon,
        behaviour=np.concatenate(
            [(1 - epsilon) * o + epsilon * e for o, e in zip(own, explored, strict=True)]
        ).tobytes(),
        propensity=behaviour[action],
        nvec=nvec if len(nvec) > 1 else (),
        action_kind="multi_discrete" if len(nvec) > 1 else "discrete",
        exploring=b"" if uniform else np.concatenate(explored).tobytes(),
    )
    target = np.concatenate(wanted)
    fields = entry("d", 1_000, recorded, a=action_text(action), m=b"\1" * sum(nvec))
    it = row(0, fields)
    step = own_step(it, CHAMPION, "d1", Judging())
    assert step.target == pytest.approx(mass(own, action), abs=1e-8)
    assert step.propensity == pytest.approx(behaviour[action])
    assert step.unsupported == 0.0
    assert own_step(it, CHAMPION, "another", Judging()).propensity is None
    raw = score("d", 0, tuple(target.tolist()), probability=mass(wanted, action))
    step = shadow_step(it, said(raw), (CHAMPION, "d1"), Judging())
    assert step.target == pytest.approx(mass(wanted, action))
    assert step.unsupported == pytest.approx(sum(mass(wanted, a) for a in actions if behaviour[a] == 0.0), abs=1e-8)
    best, mine = (tuple(int(each.argmax()) for each in factors) for factors in (wanted, own))
    assert (step.disagrees, step.matched) == (best != mine, best != mine and best == action)


def test_what_is_not_known_has_no_propensity() -> None:
    recorded = record(epsilon=1.0)
    assert own_step(row(0, entry("d", 0, recorded)), CHAMPION, "d1", Judging()).propensity is None
    unknown = row(0, entry("d", 0, record(propensity=None, propensity_reason="check_failed")))
    assert own_step(unknown, CHAMPION, "d1", Judging()).propensity is None
    assert shadow_step(row(0, entry("d", 0, record())), None, (CHAMPION, "d1"), Judging()).propensity is None
    worse = row(0, entry("d", 0, record(), reward=None, j="quarantined"))
    assert own_step(worse, CHAMPION, "d1", Judging(worst=-3.0)).reward == -3.0
    void = row(0, entry("d", 0, record(), reward=None, j="void"))
    assert own_step(void, CHAMPION, "d1", Judging(worst=-3.0)).reward is None


# -- units


def units(objective: str) -> Units:
    return msgspec.convert(
        {"objective": objective, "route_by": None, "named": True, "time_ms": TIME_MS, "window_ms": WINDOW_MS,
         "decisions": 3, "patience_ms": 500},
        Units,
    )  # fmt: skip


def world(rng: random.Random, objective: str) -> list[Seen]:
    """Decisions of many units, in the order in which they close."""
    found = []
    for unit in range(rng.randrange(1, 25)):
        at = rng.randrange(0, 50_000)
        for step in range(rng.randrange(1, 7)):
            name = f"d{unit}-{step}"
            named = rng.random() < 0.9 or objective == "episode"
            recorded = record(key=f"k{unit}" if named and unit % 4 else None)
            place: dict[str, Any] = {"ep": f"e{unit}", "st": step} if objective == "episode" else {}
            fields = entry(name, at, recorded, x=rng.choice(["none", "terminated", "lost"]), **place)
            found.append((at + rng.randrange(WINDOW_MS), fields))
            at += rng.randrange(2_500)
    found.sort(key=lambda each: each[0])
    return [row(place, fields) for place, (_, fields) in enumerate(found)]


def expected(rows: list[Seen], objective: str) -> list[tuple[int, list[str], bool]]:
    """Start, decisions in their order, and whether nothing is missing, of every complete unit."""
    named: dict[str, list[Seen]] = {}
    for each in rows:
        name = each.episode if objective == "episode" else each.record.key
        named.setdefault(name or each.id, []).append(each)
    found = []
    for own in named.values():
        start = min(each.at_ms for each in own)
        own = sorted((each for each in own if each.at_ms - start < TIME_MS), key=lambda each: (each.at_ms, each.id))
        own = own[:3] if objective == "step" else sorted(own, key=lambda each: each.step)
        found.append((start, [each.id for each in own], own[-1].ended))
    return sorted(found)


def plain(found: list[Complete]) -> list[tuple[int, list[str], bool]]:
    return sorted((unit.start_ms, [each.id for each in unit.rows], unit.rows[-1].ended) for unit in found)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), objective=st.sampled_from(["step", "episode"]))
def test_units_are_those_of_an_oracle_in_the_order_of_their_start(seed: int, objective: str) -> None:
    rng = random.Random(seed)
    rows, found = world(rng, objective), []
    book = Book(units(objective), 0, 0)
    for place, each in enumerate(rows):
        book.add(each)
        if rng.random() < 0.2:  # what is due by then has closed: all that was decided a window before
            through = min((later.at_ms for later in rows[place + 1 :]), default=CLOSED_MS) - 1 + WINDOW_MS
            found += [list(bucket) for bucket in book.buckets(through)]
            book.settle(through)
    found += [list(bucket) for bucket in book.buckets(2 * CLOSED_MS)]
    together = [unit for bucket in found for unit in bucket]
    assert plain(together) == expected(rows, objective)
    assert [unit.start_ms for unit in together] == sorted(unit.start_ms for unit in together)
    assert (book.held, dict(book.counts)) == (0, {})
    for each in rows:  # once more, as whoever goes on reads them
        book.add(each)
    assert list(book.buckets(2 * CLOSED_MS)) == []


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_share_is_kept_by_the_hash_of_the_unit_alone(seed: int) -> None:
    rng = random.Random(seed)
    rows = world(rng, "episode")
    book = Book(units("episode"), 0, 0)
    halved = rng.randrange(len(rows))
    for place, each in enumerate(rows):
        if place == halved:
            book.halve()
        book.add(each)
    kept = {unit.rows[0].episode for bucket in book.buckets(2 * CLOSED_MS) for unit in bucket}
    assert all(height(f"e:{each.episode}") < 0.5 for each in rows[halved:] if each.episode in kept)
    low = {each.episode for each in rows if height(f"e:{each.episode}") < 0.5}
    assert low <= kept


def test_memory_is_bounded_and_what_comes_too_late_is_counted() -> None:
    book = Book(units("step"), 1_000, 1_000, most_bytes=20_000)
    for place in range(200):
        book.add(row(place, entry(f"d{place}", 1_000 + place, record())))
    assert book.held < 20
    assert book.share < 0.25
    list(book.buckets(CLOSED_MS))
    book.settle(CLOSED_MS)
    book.add(row(300, entry("late", 1_500, record())))
    book.add(row(301, entry("before", 500, record())))
    assert (book.counts["late"], book.counts["begun"], book.held) == (1, 1, 0)
