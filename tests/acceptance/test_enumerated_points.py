"""Every logged probability of a point is that of the executed one: held against scipy's distributions, and simulation.

Over a box nothing can be listed: there are atoms at its ends (and where a deterministic head points), and a density
between. What is right is said here once more, coordinate by coordinate, and integrated by quadrature.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from scipy import integrate, stats

from safety.exploration import Exploration, RateCap
from service.allowance import Allowance
from service.decision import decode_record
from service.metrics import Metrics
from service.plan import LoadedVersion, Row, Safeguards
from service.wire import ActResponse
from tests.policies.networks import linear
from tests.service.pipelines import decider, plan, recorded, version
from tests.service.test_budget import leased
from tests.service.test_rules import ruled

METRICS = Metrics(CollectorRegistry())
SPACE = ((-1.0, 2.0), (0.0, 1.0))  # of each coordinate
FALLBACK = 0.5
CLOSE = 1e-6
NAN = float("nan")


@dataclass(frozen=True)
class Line:
    """One coordinate: what the head says of its raw action, and the box. std 0: the head is deterministic."""

    mean: float
    std: float
    transform: str
    space: tuple[float, float]
    low: float
    high: float
    sigma: float

    @property
    def centre(self) -> float:
        """What the version would do without chance, within the box."""
        return min(self.high, max(self.low, self.moved(self.mean)))

    def moved(self, z: float) -> float:
        unit = math.tanh(z) if self.transform == "tanh" else z
        return z if self.transform == "none" else self.space[0] + (unit + 1.0) / 2.0 * self._width

    @property
    def _width(self) -> float:
        return self.space[1] - self.space[0]

    def _raw(self, a: float) -> tuple[float, float]:
        """The raw action behind an executed one, and da/dz there."""
        if self.transform == "none":
            return a, 1.0
        unit = (a - self.space[0]) / self._width * 2.0 - 1.0
        if self.transform == "unscale":
            return unit, self._width / 2.0
        if abs(unit) >= 1.0:
            return math.copysign(math.inf, unit), 0.0
        return math.atanh(unit), (1.0 - unit * unit) * self._width / 2.0

    def atoms(self) -> list[float]:
        """Where single points may have a probability."""
        return sorted({self.low, self.high} | ({self.centre} if self.std == 0.0 else set()))

    def own(self, a: float) -> float:
        """The version's part at a: its mass on an atom, its density elsewhere."""
        if self.low == self.high:
            return 1.0
        if self.std == 0.0:
            return float(a == self.centre)
        z, slope = self._raw(a)
        if a == self.low:
            return float(stats.norm.cdf(z, self.mean, self.std))
        if a == self.high:
            return float(stats.norm.sf(z, self.mean, self.std))
        return float(stats.norm.pdf(z, self.mean, self.std)) / slope

    def exploring(self, a: float) -> float:
        """The exploring part at a."""
        if self.low == self.high:
            return 1.0
        if a == self.low:
            return float(stats.norm.cdf(a, self.centre, self.sigma))
        if a == self.high:
            return float(stats.norm.sf(a, self.centre, self.sigma))
        if a in self.atoms():
            return 0.0
        return float(stats.norm.pdf(a, self.centre, self.sigma))


def right(lines: Sequence[Line], epsilon: float, point: Sequence[float]) -> tuple[float, str]:
    """b at a point, and what kind of number it is."""
    own = math.prod(line.own(a) for line, a in zip(lines, point, strict=True))
    exploring = math.prod(line.exploring(a) for line, a in zip(lines, point, strict=True)) if epsilon > 0.0 else 0.0
    atoms = sum(a in line.atoms() for line, a in zip(lines, point, strict=True))
    kind = "mass" if atoms == len(lines) else "mixed" if atoms else "density"
    return (1.0 - epsilon) * own + epsilon * exploring, kind


@dataclass(frozen=True)
class World:
    """A head over one or two coordinates. bounds: what a rule leaves, None: there is none."""

    head: str
    transform: str = "none"
    epsilon: float = 0.3
    sigma: float = 0.4
    bounds: tuple[tuple[float, float], ...] | None = None
    coordinates: int = 1
    budget: str = "none"

    def lines(self, row: Row) -> list[Line] | None:
        """None: the fallback answers."""
        numbers: list[float] = row.state  # type: ignore[assignment]
        if not all(map(math.isfinite, numbers)):
            return None
        found = []
        for j in range(self.coordinates):
            std = 0.0 if self.head == "action" else math.exp(numbers[self.coordinates + j])
            low, high = SPACE[j]
            for ends in [self.bounds] if self.bounds else []:
                low, high = max(low, ends[j][0]), min(high, ends[j][1])
            if row.allowed is not None:
                low, high = max(low, row.allowed[0][j]), min(high, row.allowed[1][j])  # type: ignore[index]
            if low > high:
                return None
            kind = "tanh" if self.head == "squashed_gaussian" else self.transform
            found.append(Line(numbers[j], std, kind, SPACE[j], low, high, self.sigma))
        return found

    def in_force(self, row: Row) -> float:
        return self.epsilon if row.explore and self.budget in ("none", "ample") else 0.0

    def safeguards(self, loaded: LoadedVersion) -> Safeguards:
        document = Exploration(epsilon=self.epsilon, sigma=self.sigma, rate=RateCap(1 << 30, 3600.0))
        allowance = None
        if self.budget != "none":
            holder = leased(document, 1 << 30 if self.budget == "ample" else 0)
            allowance = Allowance(document, holder, lambda: 0.1)
        ruling = None
        if self.bounds is not None:
            low, high = ([ends[side] for ends in self.bounds] for side in (0, 1))
            rule = f"{{kind: bounds, name: b, low: {low}, high: {high}, except_fallback: true}}"
            ruling = ruled(plan({"v1": loaded}), rule).ruling
        return Safeguards(ruling=ruling, allowance=allowance)


@lru_cache(maxsize=256)
def loaded(head: str, transform: str, coordinates: int, epsilon: float, sigma: float) -> LoadedVersion:
    """A version that answers with its state: means, and then logarithms of deviations."""
    size = coordinates if head == "action" else 2 * coordinates
    low, high = ([ends[side] for ends in SPACE[:coordinates]] for side in (0, 1))
    changes: dict[str, Any] = {} if transform == "none" else {"action_transform": transform}
    return version(
        METRICS,
        "v1",
        linear(np.eye(size).tolist()),
        golden_states=[[0.0] * size],
        golden_outputs=[[0.0] * size],
        head=head,
        action={"kind": "continuous", "low": low, "high": high},
        exploration={"epsilon": epsilon, "sigma": sigma},
        fallback=[FALLBACK] * coordinates,
        **changes,
    )


def decided(world: World, rows: list[Row], batch: int = 500) -> list[tuple[ActResponse, Any]]:
    """Answers and records."""
    own = world.epsilon if world.budget == "none" else 0.0
    mine = loaded(world.head, world.transform, world.coordinates, own, world.sigma if world.budget == "none" else 9.0)

    async def work() -> list[tuple[ActResponse, Any]]:
        answers: list[Any] = []
        with decider(plan({"v1": mine})) as (pipeline, ledger, _):
            pipeline.safeguards = world.safeguards(mine)
            for start in range(0, len(rows), batch):
                answers += await pipeline.decide(rows[start : start + batch])
            records = [decode_record(event.record) for event in recorded(ledger)]
            return list(zip(answers, records, strict=True))

    return asyncio.run(work())


def point_of(answer: ActResponse) -> list[float]:
    point: list[float] = answer.action  # type: ignore[assignment]
    return point


# Properties

ENDS = st.tuples(st.sampled_from([-1.5, -0.5, 0.0, 0.25]), st.sampled_from([0.0, 0.25, 0.75, 1.5]))


@st.composite
def worlds(draw: st.DrawFn) -> tuple[World, list[Row]]:
    head = draw(st.sampled_from(["action", "gaussian", "squashed_gaussian"]))
    coordinates = draw(st.integers(1, 2))
    boxes = st.tuples(*[ENDS] * coordinates)
    world = World(
        head,
        "none" if head == "squashed_gaussian" else draw(st.sampled_from(["none", "unscale"])),
        draw(st.sampled_from([0.0, 0.3, 1.0])),
        draw(st.sampled_from([0.1, 0.4, 2.0])),
        draw(st.none() | boxes.filter(lambda ends: all(low <= high for low, high in ends))),
        coordinates,
        draw(st.sampled_from(["none", "none", "ample", "exhausted"])),
    )
    rows = []
    for _ in range(draw(st.integers(1, 8))):
        mean = [draw(st.sampled_from([-1.5, -0.25, 0.0, 0.5, 0.5, 1.25])) for _ in range(coordinates)]
        spread = [draw(st.sampled_from([-2.0, -1.0, 0.0])) for _ in range(coordinates)]
        state: list[object] = [*mean, *([] if head == "action" else spread)]
        state[0] = draw(st.sampled_from([*[state[0]] * 9, NAN]))
        allowed = draw(st.none() | boxes.map(lambda ends: (tuple(e[0] for e in ends), tuple(e[1] for e in ends))))
        rows.append(Row(state=state, allowed=allowed, explore=draw(st.sampled_from([True, True, False]))))
    return world, rows


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(worlds())
def test_what_is_logged_is_the_probability_of_the_executed_point(case: tuple[World, list[Row]]) -> None:
    world, rows = case
    for row, (answer, record) in zip(rows, decided(world, rows), strict=True):
        lines = world.lines(row)
        assert (answer.fallback is not None) == (lines is None), answer.fallback
        if lines is None:
            assert point_of(answer) == [FALLBACK] * world.coordinates
            assert (answer.propensity, answer.log_propensity, record.epsilon) == (1.0, 0.0, 0.0)
            continue
        b, kind = right(lines, world.in_force(row), point_of(answer))
        assert answer.propensity_kind == record.propensity_kind == kind
        assert record.epsilon == world.in_force(row)
        assert answer.log_propensity == record.log_propensity == pytest.approx(math.log(b), abs=CLOSE)
        assert answer.propensity == (pytest.approx(b, abs=CLOSE) if kind == "mass" else None)


# Long runs

DECISIONS, CELLS = 20_000, 12
LONG = {
    "gaussian": World("gaussian"),
    "gaussian, unscaled": World("gaussian", "unscale", sigma=0.2),
    "gaussian, bounded": World("gaussian", bounds=((0.2, 0.95),)),
    "gaussian, nothing explored": World("gaussian", epsilon=0.0, bounds=((0.2, 0.95),)),
    "gaussian, budget exhausted": World("gaussian", budget="exhausted", bounds=((0.2, 0.95),)),
    "squashed": World("squashed_gaussian"),
    "squashed, bounded": World("squashed_gaussian", bounds=((0.2, 0.95),), budget="ample"),
    "deterministic": World("action"),
    "deterministic, bounded": World("action", bounds=((0.2, 0.95),)),
    "deterministic, at an end": World("action", bounds=((0.75, 0.95),)),
    "all explored": World("squashed_gaussian", epsilon=1.0, sigma=1.0, budget="ample"),
}


def row_of(world: World) -> Row:
    return Row(state=[0.5] if world.head == "action" else [0.5, -0.5])


def cells_of(line: Line) -> list[tuple[float, float]]:
    """The box, cut at its atoms and at equal distances."""
    edges = sorted({*np.linspace(line.low, line.high, CELLS + 1).tolist(), *line.atoms()})
    return list(pairwise(edges))


@pytest.mark.parametrize("name", LONG)
def test_points_fall_as_often_as_their_log_probabilities_say(name: str) -> None:
    world = LONG[name]
    row = row_of(world)
    (line,) = world.lines(row) or []
    epsilon = world.in_force(row)
    atoms, cells = line.atoms(), cells_of(line)

    def density(a: float) -> float:
        return right([line], epsilon, [a])[0] if a not in atoms else 0.0

    masses = [right([line], epsilon, [a])[0] for a in atoms]
    between = [integrate.quad(density, low, high)[0] for low, high in cells]
    assert sum(masses) + sum(between) == pytest.approx(1.0, abs=CLOSE)

    answers = [answer for answer, _ in decided(world, [row] * DECISIONS)]
    points = np.array([point_of(answer)[0] for answer in answers])
    logs = np.array([answer.log_propensity for answer in answers], dtype=np.float64)
    loose = ~np.isin(points, atoms)
    at = [int((points == a).sum()) for a in atoms]
    within = [int((loose & (low <= points) & (points < high)).sum()) for low, high in cells]
    assert sum(at) + sum(within) == DECISIONS
    agree(np.array(at + within), np.array(masses + between))
    weighed(points, logs, loose, atoms, cells)


def agree(seen: Any, likely: Any) -> None:
    """Counts against probabilities, those that are small taken together."""
    assert seen[likely == 0.0].sum() == 0
    small = likely * DECISIONS < 10.0
    counts = [*seen[~small], seen[small].sum()]
    wanted = [*(likely[~small] * DECISIONS), likely[small].sum() * DECISIONS]
    if wanted[-1] < 10.0:  # too few to judge by: they go to the largest
        wanted[int(np.argmax(wanted))] += wanted.pop()
        counts[int(np.argmax(wanted))] += counts.pop()
    if len(counts) > 1:
        assert stats.chisquare(counts, np.array(wanted) / sum(wanted) * DECISIONS).pvalue > 1e-3


def weighed(points: Any, logs: Any, loose: Any, atoms: Sequence[float], cells: Sequence[tuple[float, float]]) -> None:
    """What is logged, against simulation alone: the mean of 1/b over a cell's draws is its width; an atom's b how often
    it was drawn.
    """
    for low, high in cells:
        inside = loose & (low <= points) & (points < high)
        if inside.sum() >= 200:
            weights = np.where(inside, np.exp(-logs), 0.0)
            error = weights.std() / math.sqrt(len(weights))
            assert abs(weights.mean() - (high - low)) < 4.5 * error + 1e-9
    for a in atoms:
        (said,) = {round(float(log), 12) for log in logs[points == a]} or {-math.inf}
        assert stats.binomtest(int((points == a).sum()), len(points), min(1.0, math.exp(said))).pvalue > 1e-4
