"""What is said of a shadow, against slow re-implementations that take one row, and one choice, at a time."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from policies.continuous import Gaussian, Transform
from policies.heads import target
from policies.types import HeadKind
from shadow.compare import Compared, compare_choices, finite, uniforms_of
from shadow.compare_points import compare_points
from shadow.shown import ChoiceRows, PointRows

HEADS: tuple[HeadKind, ...] = ("q_values", "logits", "probabilities")


def enumerated(scores: list[float], greedy: bool, faulty: bool, mask: list[bool], fallback: int | None) -> list[float]:
    """A shadow's distribution without exploration, by its definition."""
    allowed = [a for a, yes in enumerate(mask) if yes]
    mass = sum(scores[a] for a in allowed)
    if faulty or not allowed or (not greedy and mass <= 0.0):
        return [1.0 if a == fallback else 0.0 for a in range(len(mask))]
    if greedy:
        best = max(allowed, key=lambda a: (scores[a], -a))
        return [1.0 if a == best else 0.0 for a in range(len(mask))]
    return [scores[a] / mass if a in allowed else 0.0 for a in range(len(mask))]


def inverted(p: list[float], u: float) -> int:
    total = 0.0
    for a, each in enumerate(p):
        total += each
        if each > 0.0 and total > u * sum(p):
            return a
    return max(a for a, each in enumerate(p) if each > 0.0)


Case = tuple[Any, ChoiceRows, np.ndarray, int | None, np.ndarray]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, n = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    head = draw(st.sampled_from(HEADS))
    numbers = st.one_of(st.floats(-20, 20, width=32), st.sampled_from([np.nan, np.inf]))
    outputs = draw(hnp.arrays(np.float32, (rows, n), elements=numbers))
    if head == "probabilities":
        weights = np.abs(np.nan_to_num(outputs, posinf=1)) + 0.01
        outputs = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    mask = draw(hnp.arrays(np.bool_, (rows, n)))
    own = draw(hnp.arrays(np.float64, (rows, n), elements=st.sampled_from([0.0, 0.25, 1.0])))
    own[own.sum(axis=1) == 0.0, 0] = 1.0
    own /= own.sum(axis=1, keepdims=True)
    actions = draw(hnp.arrays(np.int64, (rows, 1), elements=st.integers(0, n - 1)))
    ruled = draw(st.one_of(st.none(), hnp.arrays(np.bool_, (rows, n))))
    logged = ChoiceRows(
        (n,), (), mask, ruled, own, np.zeros(rows, np.bool_), actions, np.full(rows, 0.5), outputs if rows % 2 else None
    )
    u = draw(hnp.arrays(np.float64, (rows, 2), elements=st.floats(0, 1, exclude_max=True)))
    return target(outputs, head), logged, u, draw(st.one_of(st.none(), st.integers(0, n - 1))), outputs


@given(cases())
def test_choices_are_compared_as_the_definitions_say(case: Case) -> None:
    wanted, logged, u, fallback, outputs = case
    values = np.where(wanted.faulty[:, None], 0.0, outputs).astype(np.float64)
    found = finite(compare_choices(wanted, logged, u, None if fallback is None else (float(fallback),), values))
    for i in range(len(u)):
        mask, q = logged.mask[i].tolist(), logged.own[i].tolist()
        p = enumerated(wanted.scores[i].tolist(), wanted.greedy, bool(wanted.faulty[i]), mask, fallback)
        # A softmax may leave a float's worth of mass where its weights are lost to rounding.
        assert found.target[i] == pytest.approx(p, abs=1e-9)
        executed = int(logged.actions[i, 0])
        assert math.exp(found.log_probability[i]) == pytest.approx(p[executed], abs=1e-9)
        refused = not any(p)
        assert found.divergence[i] == pytest.approx(
            1.0 if refused else 0.5 * sum(abs(a - b) for a, b in zip(p, q, strict=True)), abs=1e-9
        )
        kl = sum(a * math.log(a / b) if b else math.inf for a, b in zip(found.target[i].tolist(), q, strict=True) if a)
        assert found.kl[i] == pytest.approx(max(kl, 0.0), abs=1e-9)
        assert found.fallen[i] == (wanted.faulty[i] or not any(mask))
        if not refused:
            assert p[int(found.proposed[i, 0])] > 0.0 or wanted.faulty[i]
            assert found.agrees[i] == (found.proposed[i, 0] == inverted(q, u[i, 1]))
        else:
            assert not found.agrees[i]
        choice = int(found.unmasked[i, 0])
        expected = logged.ruled is not None and not logged.ruled[i, choice] and not wanted.faulty[i]
        assert found.overridden[i] == expected
        if wanted.faulty[i]:
            assert np.isnan([found.value[i], found.expected[i], found.difference[i]]).all()
            continue
        assert found.value[i] == values[i, executed]
        assert found.expected[i] == pytest.approx(sum(a * v for a, v in zip(p, values[i], strict=True)), abs=1e-6)
        assert (found.difference[i] == 0.0) if logged.values is not None else np.isnan(found.difference[i])


def two_factors(joint: bool) -> tuple[ChoiceRows, np.ndarray]:
    random = np.random.default_rng(2)
    rows = 50
    by_factor = np.concatenate([random.dirichlet([1, 1], rows), random.dirichlet([1, 1, 1], rows)], axis=1)
    actions = np.stack([random.integers(0, 2, rows), random.integers(0, 3, rows)], axis=1)
    mask = np.ones((rows, 6 if joint else 5), np.bool_)
    own = np.einsum("ia,ib->iab", by_factor[:, :2], by_factor[:, 2:]).reshape(rows, 6) if joint else by_factor
    nvec, factors = ((6,), (2, 3)) if joint else ((2, 3), ())
    fallen = np.zeros(rows, np.bool_)
    logged = ChoiceRows(nvec, factors, mask, None, own, fallen, actions, np.full(rows, np.nan), None)
    return logged, by_factor


@pytest.mark.parametrize("joint", [False, True])
def test_several_factors_are_products(joint: bool) -> None:
    logged, q = two_factors(joint)
    random = np.random.default_rng(3)
    outputs = np.concatenate([random.dirichlet([1, 1], 50), random.dirichlet([1, 1, 1], 50)], axis=1)
    u = random.uniform(size=(50, uniforms_of(logged)))
    found = compare_choices(target(outputs, "probabilities", None, (2, 3)), logged, u, (0.0, 0.0), outputs)
    for i, (x, y) in enumerate(logged.actions.tolist()):
        p = outputs[i]
        assert math.exp(found.log_probability[i]) == pytest.approx(p[x] * p[2 + y])
        pairs = list(itertools.product(range(2), range(3)))
        one = {(a, b): p[a] * p[2 + b] for a, b in pairs}
        two = {(a, b): q[i][a] * q[i][2 + b] for a, b in pairs}
        total = 0.5 * sum(abs(one[each] - two[each]) for each in pairs)
        assert total <= found.divergence[i] + 1e-12
        assert found.divergence[i] == pytest.approx(total) or not joint
        assert found.kl[i] == pytest.approx(sum(one[each] * math.log(one[each] / two[each]) for each in pairs))
        assert found.target[i] == pytest.approx(p)
        assert found.proposed.shape == (50, 2)
        assert found.value[i] == pytest.approx(p[x] + p[2 + y])


def test_a_joint_mask_and_a_joint_fallback_are_tuples_of_choices() -> None:
    logged, _ = two_factors(True)
    mask = np.zeros((50, 6), np.bool_)
    mask[:25, 4] = True  # (1, 1) alone
    logged = ChoiceRows((6,), (2, 3), mask, mask, logged.own, logged.fallen, logged.actions, logged.propensity, None)
    wanted = target(np.tile([9.0, 0.0, 9.0, 0.0, 0.0], (50, 1)), "q_values", None, (2, 3))
    found = compare_choices(wanted, logged, np.full((50, 2), 0.5), (1.0, 2.0))
    assert found.proposed[:25].tolist() == [[1, 1]] * 25
    assert found.proposed[25:].tolist() == [[1, 2]] * 25, "nothing is left: its fallback"
    assert found.unmasked.tolist() == [[0, 0]] * 50
    assert found.overridden.all()
    assert (found.target[:25] == [0, 1, 0, 1, 0]).all()


BOX = np.array([-1.0, -2.0]), np.array([1.0, 2.0])


def point_rows(std: float, low: float = -1.0, high: float = 1.0, rows: int = 40, **changes: Any) -> PointRows:
    """Decisions of a version with mean 0.3 and this deviation, in a box."""
    random = np.random.default_rng(7)
    mean, deviation = np.full((rows, 2), 0.3), np.full((rows, 2), std)
    ends = np.tile([low, low], (rows, 1)), np.tile([high, high], (rows, 1))
    actions = np.clip(mean + deviation * random.normal(size=(rows, 2)), *ends)
    fields: dict[str, Any] = {
        "transform": Transform("none", *BOX),
        "low": ends[0],
        "high": ends[1],
        "ruled_low": None,
        "ruled_high": None,
        "mean": mean,
        "std": deviation,
        "centre": np.clip(mean, *ends),
        "declared": np.zeros((rows, 2)),
        "fallen": np.zeros(rows, np.bool_),
        "actions": actions,
        "log_propensity": np.zeros(rows),
    }
    return PointRows(**fields | changes)


def gaussian(mean: float, std: float, rows: int = 40) -> Gaussian:
    return Gaussian(np.full((rows, 2), mean), np.full((rows, 2), std), np.zeros(rows, np.bool_))


def compared(wanted: Gaussian, logged: PointRows, fallback: tuple[float, ...] | None = (0.0, 0.0)) -> Compared:
    u = np.random.default_rng(8).uniform(size=(len(logged.low), 3))
    return compare_points(wanted, Transform("none", *BOX), logged, u, fallback)


def test_points_have_densities_between_the_ends_and_masses_on_them() -> None:
    logged = point_rows(0.8)
    found = compared(gaussian(-0.2, 0.5), logged)
    said = stats.norm(-0.2, 0.5)
    kinds = set()
    for i, point in enumerate(logged.actions.tolist()):
        log_p = sum(said.logcdf(-1.0) if x == -1.0 else said.logsf(1.0) if x == 1.0 else said.logpdf(x) for x in point)
        assert found.log_probability[i] == pytest.approx(log_p)
        ends = sum(x in (-1.0, 1.0) for x in point)
        assert found.kinds[i] == ("density", "mixed", "mass")[ends]
        kinds.add(found.kinds[i])
    assert kinds >= {"density", "mixed"}
    assert found.w2 == pytest.approx(math.sqrt(2 * (0.5**2 + 0.3**2)))
    assert found.divergence == pytest.approx(0.5 / 2.0)
    assert np.isnan(found.kl).all()


def test_a_version_agrees_with_itself() -> None:
    found = compared(gaussian(0.3, 0.8), point_rows(0.8))
    assert found.agrees.all()
    assert (found.divergence == 0.0).all()
    assert (found.w2 == 0.0).all()
    assert not found.overridden.any()


def test_where_only_one_has_an_atom_there_is_no_mass_or_no_ratio() -> None:
    # A deterministic version decided: it has an atom where it went, and a shadow with a density has no mass there.
    still = point_rows(0.0)
    assert np.isneginf(compared(gaussian(0.3, 0.5), still).log_probability).all()
    # Both are deterministic, and do the same, or another.
    assert (compared(gaussian(0.3, 0.0), still).log_probability == 0.0).all()
    assert np.isneginf(compared(gaussian(0.4, 0.0), still).log_probability).all()
    # The shadow alone has an atom: at a point that a density drew it almost never is, and if so, there is no ratio.
    moved = point_rows(0.8, actions=np.full((40, 2), 0.25))
    assert np.isneginf(compared(gaussian(0.3, 0.0), moved).log_probability).all()
    assert np.isnan(compared(gaussian(0.25, 0.0), moved).log_probability).all()


def test_points_beyond_what_rules_leave_are_overridden_and_an_empty_box_is_a_fallback() -> None:
    ruled = np.full((40, 2), -0.5), np.full((40, 2), 0.5)
    logged = point_rows(0.1, -0.5, 0.5, ruled_low=ruled[0], ruled_high=ruled[1])
    assert compared(gaussian(0.9, 0.0), logged).overridden.all()
    assert not compared(gaussian(0.2, 0.0), logged).overridden.any()
    empty = np.full((40, 2), np.inf), np.full((40, 2), -np.inf)
    fallen = point_rows(
        0.1, low=1.0, high=1.0, actions=np.zeros((40, 2)), fallen=np.ones(40, np.bool_), centre=np.zeros((40, 2))
    )
    fallen = PointRows(**{**{f: getattr(fallen, f) for f in PointRows.__slots__}, "low": empty[0], "high": empty[1]})
    same, other, none = (compared(gaussian(0.2, 0.3), fallen, each) for each in ((0.0, 0.0), (0.5, 0.0), None))
    assert (same.log_probability == 0.0).all()
    assert same.agrees.all()
    assert same.fallen.all()
    assert (same.divergence == 0.0).all()
    assert np.isneginf(other.log_probability).all()
    assert not other.agrees.any()
    assert np.isneginf(none.log_probability).all()
    assert (none.divergence == 1.0).all()
    assert not none.agrees.any()


def test_sides_without_ends_are_compared_by_size_and_transforms_by_kind() -> None:
    open_sides = Transform("none", np.array([-np.inf, -2.0]), np.array([np.inf, 2.0]))
    logged = point_rows(0.0, transform=open_sides)
    u = np.full((40, 3), 0.5)
    near, far = (
        compare_points(gaussian(each, 0.0), open_sides, logged, u, (0.0, 0.0)).divergence for each in (0.305, 0.5)
    )
    assert (near < 0.01).all()
    assert (far == 1.0).all()
    squashed = compare_points(gaussian(0.3, 0.1), Transform("tanh", *BOX), logged, u, (0.0, 0.0))
    assert np.isnan(squashed.w2).all()
