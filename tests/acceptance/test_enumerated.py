"""Every logged probability is that of the executed action: held against a list of all actions, made by other means.

For each head, mask, ε, state of the budget and fallback: a property test over random worlds, and long runs of which the
frequencies are counted. What is right is said in `enumerated.py`.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from scipy import stats

from policies.draw import uniforms
from policies.errors import NoSafeAction
from safety.exploration import Exploration, RateCap, RegretCap, ShareCap
from safety.lease import Holder
from service.act import Decider
from service.allowance import Allowance
from service.decision import decode_record
from service.metrics import Metrics
from service.plan import LoadedVersion, Outcome, Plan, Row, Safeguards
from service.wire import ActResponse
from tests.acceptance.enumerated import Action, Asked, Forbidding, Listed, Sparing, World, every, listed, marginals
from tests.acceptance.enumerated import faulty as is_faulty
from tests.policies.networks import linear
from tests.service.pipelines import KEYS, decider, plan, recorded, version
from tests.service.test_budget import leased
from tests.service.test_rules import ruled

METRICS = Metrics(CollectorRegistry())
SPACES = ((2,), (3,), (4,), (2, 2), (3, 2))
HEADS = (
    ("q_values", None),
    ("q_values", 0.5),
    ("logits", None),
    ("logits", 2.0),
    ("probabilities", None),
    ("action", None),
)
NAMES = ("x", "y")
NAN = float("nan")
LARGE = 1 << 30
CLOSE = 1e-6


@dataclass(frozen=True)
class Budget:
    """What is declared of exploration. left: explored decisions, or millionths of regret, that the lease holds; None:
    no cap.
    """

    epsilon: float
    declared: bool = False
    left: int | None = None
    leased: bool = True
    cap: Literal["rate", "share", "regret"] = "rate"

    def allowance(self, world: World) -> Allowance | None:
        if not self.declared:
            return None
        caps = {"rate": RateCap(LARGE, 3600.0), "share": ShareCap(1.0, 3600.0), "regret": RegretCap(50.0, 3600.0)}
        document = Exploration(
            epsilon=self.epsilon,
            temperature=world.exploring,
            when_frozen="mode" if world.mode else "sample",
            **({} if self.left is None else {self.cap: caps[self.cap]}),  # type: ignore[arg-type]
        )
        holder = leased(document, self.left or 0) if self.leased else Holder("one", document, 1)
        return Allowance(document, holder, lambda: 0.1)

    def in_force(self, world: World, rows: Sequence[Asked], u0: Sequence[float], frozen: bool) -> list[float]:
        """ε for rows in their order: each row that was to explore leaves one less to those behind it."""
        left = (LARGE if self.left is None else self.left) if self.leased else 0
        if self.cap == "regret" and left < LARGE:
            left = 0  # a few millionths: the cheapest action costs more
        found = []
        for row, uniform in zip(rows, u0, strict=True):
            wants = row.explore and not frozen and not is_faulty(world, row.outputs)
            found.append(self.epsilon if wants and left > 0 else 0.0)
            left -= uniform < found[-1]
        return found


@lru_cache(maxsize=256)
def loaded(nvec: Action, head: str, temperature: float | None, epsilon: float, fallback: bool = True) -> LoadedVersion:
    """A version that answers with its state."""
    size = len(nvec) if head == "action" else sum(nvec)
    starts = [0, *accumulate(nvec)][:-1]
    first = [float(column in starts) for column in range(sum(nvec))]  # of each factor the first choice
    names = [{"name": name} for name in NAMES]
    several = {"kind": "multi_discrete", "nvec": list(nvec), "factors": names}
    return version(
        METRICS,
        "v1",
        linear(np.eye(size).tolist()),
        golden_states=[[0.0] * size if head == "action" else first],
        golden_outputs=[first],
        head=head,
        temperature=temperature,
        action=several if len(nvec) > 1 else {"kind": "discrete", "n": nvec[0]},
        exploration={"epsilon": epsilon},
        fallback="none" if not fallback else [1] * len(nvec) if len(nvec) > 1 else 1,
    )


def in_force(world: World, budget: Budget, fallback: bool = True) -> Plan:
    epsilon = 0.0 if budget.declared else budget.epsilon
    return plan({"v1": loaded(world.nvec, world.head, world.temperature, epsilon, fallback)})


def safeguards(world: World, budget: Budget, in_force: Plan, frozen: bool) -> Safeguards:
    texts = [*(rule.text for rule in world.forbidding), *(rule.text for rule in world.sparing)]
    ruling = ruled(in_force, *texts).ruling if texts else None
    halts = frozenset({"freeze_exploration"} if frozen else ())
    return Safeguards(halts=halts, ruling=ruling, allowance=budget.allowance(world))  # type: ignore[arg-type]


def asked(world: World, row: Asked) -> Row:
    starts = [0, *accumulate(world.nvec)]
    columns = None
    if row.allowed is not None:
        columns = tuple(starts[factor] + choice for factor, each in enumerate(row.allowed) for choice in sorted(each))
    return Row(state=list(row.outputs), allowed=columns, explore=row.explore, include=("distribution",))


def action_of(answer: ActResponse) -> Action:
    return tuple(answer.action) if isinstance(answer.action, list) else (answer.action,)  # type: ignore[arg-type]


def u0_of(world: World, ids: Sequence[str]) -> list[float]:
    """The first uniforms of decisions. A tuple of choices is drawn with one more, or, as a whole, with one."""
    count = 1 + (1 if world.jointly else len(world.nvec))
    found: list[float] = uniforms(KEYS.signing.draw, ids, count)[:, 0].tolist()
    return found


def expected(world: World, budget: Budget, rows: Sequence[Asked], ids: Sequence[str], frozen: bool) -> list[Listed]:
    strengths = budget.in_force(world, rows, u0_of(world, ids), frozen)
    return [listed(world, row, strength) for row, strength in zip(rows, strengths, strict=True)]


# Worlds

VALUES = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 1.0, 3.0])  # sums of them are exact, and ties are common


@st.composite
def outputs(draw: st.DrawFn, nvec: Action, head: str) -> tuple[float, ...]:
    size = len(nvec) if head == "action" else sum(nvec)
    if draw(st.integers(0, 9)) == 0:
        return tuple(draw(st.lists(st.sampled_from([NAN, math.inf, -1.0, 7.5]), min_size=size, max_size=size)))
    if head == "action":
        return tuple(float(draw(st.integers(0, n - 1))) for n in nvec)
    if head == "probabilities":
        parts = [draw(st.lists(st.integers(0, 3), min_size=n, max_size=n).filter(any)) for n in nvec]
        return tuple(float(np.float32(part / sum(each))) for each in parts for part in each)
    return tuple(draw(VALUES) for _ in range(size))


@st.composite
def forbidding(draw: st.DrawFn, nvec: Action, name: str) -> Forbidding:
    factor = draw(st.integers(0, len(nvec) - 1))
    choice = draw(st.integers(0, nvec[factor] - 1))
    form = draw(st.sampled_from(["always", "in_states", "fails", "monitor", "jointly"]))
    end = f", name: {name}, except_fallback: true"
    if form == "jointly" and len(nvec) > 1:
        pair = tuple(draw(st.integers(0, n - 1)) for n in nvec)
        when = " && ".join(f"action.{each}.index == {k}" for each, k in zip(NAMES, pair, strict=True))
        return Forbidding(f"{{kind: forbid, when: '{when}'{end}}}", lambda _, a: a == pair, jointly=True)
    about = f"action.index == {choice}"
    end += f", factor: {NAMES[factor]}" if len(nvec) > 1 else ""
    if form == "in_states":
        text = f"{{kind: forbid, when: 'state.f0 > 0.1 && {about}'{end}}}"
        return Forbidding(text, lambda s, a: s[0] > 0.1 and a[factor] == choice)
    if form == "fails":  # there is no context: what cannot be evaluated denies
        return Forbidding(
            f"{{kind: forbid, when: 'context.hour > 3.0 && {about}'{end}}}", lambda _, a: a[factor] == choice
        )
    if form == "monitor":
        return Forbidding(f"{{kind: forbid, mode: monitor, when: '{about}'{end}}}", lambda _, a: False)
    return Forbidding(f"{{kind: forbid, when: '{about}'{end}}}", lambda _, a: a[factor] == choice)


@st.composite
def sparing(draw: st.DrawFn, nvec: Action, name: str) -> Sparing:
    factor = draw(st.integers(0, len(nvec) - 1))
    named = draw(st.sets(st.integers(0, nvec[factor] - 1), min_size=1))
    only = draw(st.booleans())
    end = f", factor: {NAMES[factor]}" if len(nvec) > 1 else ""
    kind = "explore_only" if only else "never_explore"
    return Sparing(
        f"{{kind: {kind}, name: {name}, actions: {sorted(named)}{end}}}", lambda a: (a[factor] in named) == only
    )


BUDGETS = st.builds(
    Budget,
    epsilon=st.sampled_from([0.0, 0.3, 1.0]),
    declared=st.booleans(),
    left=st.sampled_from([None, LARGE, 3, 1, 0]),
    leased=st.sampled_from([True, True, True, False]),
    cap=st.sampled_from(["rate", "share", "regret"]),
).map(lambda each: each if each.declared else Budget(each.epsilon))


@st.composite
def worlds(draw: st.DrawFn) -> tuple[World, Budget, list[Asked], bool]:
    nvec, (head, temperature) = draw(st.sampled_from(SPACES)), draw(st.sampled_from(HEADS))
    budget = draw(BUDGETS)
    rules = tuple(draw(forbidding(nvec, f"f{i}")) for i in range(draw(st.integers(0, 3))))
    world = World(
        nvec,
        head,
        temperature,
        exploring=draw(st.sampled_from([None, 0.5, 2.0])) if budget.declared else None,
        forbidding=rules,
        sparing=tuple(draw(sparing(nvec, f"s{i}")) for i in range(draw(st.integers(0, 2)))),
        # Of tuples that tie, sums of floats decide: the mode is asked about where there are none.
        mode=budget.declared and not any(rule.jointly for rule in rules) and draw(st.booleans()),
    )
    subsets = st.none() | st.tuples(*(st.frozensets(st.integers(0, n - 1)) for n in nvec))
    row = st.builds(Asked, outputs(nvec, head), subsets, st.sampled_from([True, True, True, False]))
    return world, budget, draw(st.lists(row, min_size=1, max_size=8)), draw(st.integers(0, 7)) == 0


# Properties


def decided(world: World, budget: Budget, rows: list[Asked], frozen: bool) -> tuple[list[Outcome], list[Any]]:
    async def work() -> tuple[list[Outcome], list[Any]]:
        with decider(in_force(world, budget)) as (pipeline, ledger, _):
            pipeline.safeguards = safeguards(world, budget, pipeline.plan, frozen)
            return await pipeline.decide([asked(world, row) for row in rows]), recorded(ledger)

    return asyncio.run(work())


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(worlds())
def test_what_is_logged_is_the_probability_of_what_was_executed(case: tuple[World, Budget, list[Asked], bool]) -> None:
    world, budget, rows, frozen = case
    answers, events = decided(world, budget, rows, frozen)
    ids = [event.id for event in events]
    wanted = expected(world, budget, rows, ids, frozen)
    for answer, event, right in zip(answers, events, wanted, strict=True):
        assert isinstance(answer, ActResponse)
        held(world, answer, event, right)


def held(world: World, answer: ActResponse, event: Any, right: Listed) -> None:
    """Hold one answer and its record against the list."""
    record, action = decode_record(event.record), action_of(answer)
    assert math.fsum(right.masses.values()) == pytest.approx(1.0, abs=1e-12)
    assert (answer.fallback is not None) == right.fallen, answer.fallback
    assert right.masses.get(action, 0.0) > 0.0, (action, right)
    assert answer.propensity == record.propensity == pytest.approx(right.masses[action], abs=CLOSE)
    assert answer.exploration.epsilon == record.epsilon == pytest.approx(right.epsilon, abs=1e-12)
    flat = np.frombuffer(record.behaviour)
    assert flat == pytest.approx(marginals(world, right.masses), abs=CLOSE)
    assert np.hstack(answer.distribution) == pytest.approx(marginals_or_masses(world, right), abs=CLOSE)  # type: ignore[arg-type]
    if world.jointly and not right.fallen:
        assert list(record.joint_mask) == [action in right.mask for action in every(world)]


def marginals_or_masses(world: World, right: Listed) -> list[float]:
    """What answers show: each factor's marginal, or every tuple where a rule speaks of tuples."""
    return [right.masses.get(a, 0.0) for a in every(world)] if world.jointly else marginals(world, right.masses)


@pytest.mark.parametrize("head", ["q_values", "probabilities", "action"])
def test_without_a_declared_fallback_such_rows_are_refused_and_not_recorded(head: str) -> None:
    world, budget = World((3,), head), Budget(0.3)
    fine = (1.0, 0.0, 0.0) if head != "action" else (0.0,)
    rows = [Asked(fine), Asked((NAN,) * len(fine)), Asked(fine, (frozenset(),))]

    async def work() -> tuple[list[Outcome], int]:
        with decider(in_force(world, budget, fallback=False)) as (pipeline, ledger, _):
            return await pipeline.decide([asked(world, row) for row in rows]), len(recorded(ledger))

    (first, *others), count = asyncio.run(work())
    assert isinstance(first, ActResponse)
    assert all(isinstance(each, NoSafeAction) for each in others)
    assert count == 1


# Long runs

DECISIONS, BATCH = 20_000, 500
NEVER_0 = Sparing("{kind: never_explore, name: n, actions: [0]}", lambda a: a[0] != 0)
NOT_2 = Forbidding("{kind: forbid, name: f, when: 'action.index == 2'}", lambda _, a: a[0] == 2)
PAIR = Forbidding(
    "{kind: forbid, name: p, when: 'action.x.index == 0 && action.y.index == 1'}",
    lambda _, a: a == (0, 1),
    jointly=True,
)
Q = (0.5, 1.0, 3.0, 0.0)
LONG = {
    "greedy, masked": (World((4,), "q_values", forbidding=(NOT_2,)), Budget(0.3), Asked(Q)),
    "softened": (World((4,), "q_values", 0.5, forbidding=(NOT_2,)), Budget(0.3), Asked(Q)),
    "logits, never explored": (World((4,), "logits", sparing=(NEVER_0,)), Budget(0.3), Asked(Q)),
    "logits, frozen by the budget": (World((4,), "logits"), Budget(1.0, True, 0), Asked(Q)),
    "softmax exploration": (World((4,), "q_values", exploring=2.0), Budget(1.0, True), Asked(Q)),
    "probabilities, allowed": (
        World((3,), "probabilities"),
        Budget(0.3),
        Asked((0.25, 0.5, 0.25), (frozenset({0, 1}),)),
    ),
    "two factors": (World((3, 2), "logits"), Budget(0.3), Asked((1.0, 0.0, 0.25, -0.5, 0.5))),
    "a pair": (World((3, 2), "logits", forbidding=(PAIR,)), Budget(0.3), Asked((1.0, 0.0, 0.25, -0.5, 0.5))),
    "a pair, greedy": (World((2, 2), "q_values", forbidding=(PAIR,)), Budget(1.0), Asked((1.0, 0.0, 0.0, 1.0))),
}


async def many(pipeline: Decider, world: World, budget: Budget, row: Asked, batch: int) -> Counter[Action]:
    """Decide on the same row again and again, a fresh lease for each batch. Gives how often each action was taken."""
    found: Counter[Action] = Counter()
    fixed = safeguards(world, budget, pipeline.plan, frozen=False)
    for _ in range(DECISIONS // batch):
        pipeline.safeguards = Safeguards(ruling=fixed.ruling, allowance=budget.allowance(world))
        for answer in await pipeline.decide([asked(world, row)] * batch):
            assert isinstance(answer, ActResponse)
            found[action_of(answer)] += 1
    return found


def run_long(world: World, budget: Budget, row: Asked, batch: int = BATCH) -> Counter[Action]:
    async def work() -> Counter[Action]:
        with decider(in_force(world, budget)) as (pipeline, _, _):
            return await many(pipeline, world, budget, row, batch)

    return asyncio.run(work())


@pytest.mark.parametrize("name", LONG)
def test_frequencies_over_decision_ids_are_the_listed_ones(name: str) -> None:
    world, budget, row = LONG[name]
    counts = run_long(world, budget, row)
    right = listed(world, row, 0.0 if budget.left == 0 else budget.epsilon)
    likely = [action for action, mass in right.masses.items() if mass > 0.0]
    assert set(counts) <= set(likely)
    seen = [counts[action] for action in likely]
    assert stats.chisquare(seen, [DECISIONS * right.masses[action] for action in likely]).pvalue > 1e-3


def test_frequencies_are_the_listed_ones_when_the_budget_ends_within_each_batch() -> None:
    """ε of a row depends on what the rows before it took. Its mean is listed, too: the k-th row of a batch explores
    with ε unless two of the k before it have.
    """
    world, budget, row, batch = World((4,), "q_values"), Budget(0.3, True, 2), Asked(Q), 10
    counts = run_long(world, budget, row, batch)
    open_to = float(np.mean([stats.binom.cdf(1, k, budget.epsilon) for k in range(batch)]))
    right = listed(world, row, budget.epsilon * open_to).masses  # b is linear in ε
    seen = [counts[action] for action in right]
    # What the rows of one batch take hangs together, but only makes the sums vary less: the end of a budget evens out.
    assert stats.chisquare(seen, [DECISIONS * mass for mass in right.values()]).pvalue > 1e-3
