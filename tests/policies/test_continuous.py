"""Points in a box: b integrates to one over density and atoms, is what scipy says, and is what is drawn."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from policies.continuous import Gaussian, PointBehaviour, Transform, behave, draw, gaussian, masked_mass, propose
from policies.draw import uniforms
from policies.types import Box

KEY = b"k" * 32
LOW, HIGH = -2.0, 3.0
HEADS = [
    ("action", "none"),
    ("action", "unscale"),
    ("gaussian", "none"),
    ("gaussian", "unscale"),
    ("squashed_gaussian", "none"),
]
CUTS = [(LOW, HIGH), (-1.0, 1.5), (0.5, 0.5), (-2.0, 0.0)]


def behaviour_of(
    head: str,
    declared: str,
    cut: tuple[float, float],
    epsilon: float,
    count: int = 1,
    mean: float = 0.3,
    std: float = 0.6,
) -> PointBehaviour:
    """One coordinate between LOW and HIGH, cut by rules."""
    outputs = np.array([[mean]] if head == "action" else [[mean, np.log(std)]], dtype=np.float32)
    transform = Transform.of(head, declared, Box((LOW,), (HIGH,)))  # type: ignore[arg-type]
    box = np.full((count, 1), cut[0]), np.full((count, 1), cut[1])
    target = gaussian(np.repeat(outputs, count, axis=0), head)  # type: ignore[arg-type]
    return behave(target, transform, box, np.full(count, epsilon), np.array([0.4]), np.zeros((count, 1)))


def b_at(behaviour: PointBehaviour) -> Callable[[float], tuple[float, str]]:
    """log b at any point, by asking what the drawn point's would be: the draw itself is replaced."""
    from policies import continuous

    def ask(point: float) -> tuple[float, str]:
        log_b, kinds, _ = continuous._log_propensity(
            behaviour, np.array([[point]]), np.array([[np.nan]]), np.array([True])
        )
        return float(log_b[0]), kinds[0]

    return ask


@pytest.mark.parametrize(("head", "declared"), HEADS)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_density_and_atoms_sum_to_one(head: str, declared: str, cut: tuple[float, float], epsilon: float) -> None:
    behaviour = behaviour_of(head, declared, cut, epsilon)
    b, centre = b_at(behaviour), float(behaviour.centre[0, 0])
    atoms = {point for point in (*cut, centre) if b(point)[1] == "mass"}
    total = sum(np.exp(b(point)[0]) for point in atoms)
    if cut[0] < cut[1]:
        inside = [point for point in (centre,) if cut[0] < point < cut[1]]
        total += integrate.quad(lambda a: np.exp(b(a)[0]) if a not in atoms else 0.0, *cut, points=inside, limit=400)[0]
    assert total == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("head", "declared"), HEADS)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("epsilon", [0.0, 0.3])
def test_what_is_drawn_has_the_distribution_that_is_recorded(
    head: str, declared: str, cut: tuple[float, float], epsilon: float
) -> None:
    """20,000 draws: their share in each bin and on each atom against b, chi-square."""
    count = 20_000
    behaviour = behaviour_of(head, declared, cut, epsilon, count)
    drawn = draw(behaviour, uniforms(KEY, [f"{i:08x}" for i in range(count)], 2))
    points, ask = drawn.actions[:, 0], b_at(behaviour_of(head, declared, cut, epsilon))
    assert ((points >= cut[0]) & (points <= cut[1])).all()
    assert abs(drawn.explored.mean() - epsilon) < 0.01
    for i in range(0, count, 997):
        log_b, kind = ask(float(points[i]))
        assert (drawn.kinds[i], drawn.log_propensity[i]) == (kind, pytest.approx(log_b, abs=1e-6))
        assert (kind == "mass") == bool(np.isfinite(drawn.propensity[i]))
    expected, observed = [], []
    centre = float(behaviour.centre[0, 0])
    atoms = sorted({point for point in (*cut, centre) if ask(point)[1] == "mass"})
    for point in atoms:
        expected.append(np.exp(ask(point)[0]))
        observed.append((points == point).sum())
    if cut[0] < cut[1]:
        ends = np.unique(np.clip(np.array([cut[0], *np.linspace(cut[0], cut[1], 9), centre, cut[1]]), *cut))
        for low, high in itertools.pairwise(ends.tolist()):
            expected.append(integrate.quad(lambda a: np.exp(ask(a)[0]) if a not in atoms else 0.0, low, high)[0])
            observed.append(((points > low) & (points < high) & ~np.isin(points, atoms)).sum())
    wanted = np.array(expected) / np.sum(expected) * count
    keep = wanted > 5
    assert np.array(observed)[wanted < 1e-9].sum() == 0
    if keep.sum() > 1:
        scaled = wanted[keep] * np.array(observed)[keep].sum() / wanted[keep].sum()
        assert stats.chisquare(np.array(observed)[keep], scaled).pvalue > 1e-4


@given(st.floats(-3, 3), st.floats(0.05, 2), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_log_probabilities_are_scipys(mean: float, std: float, seed: int) -> None:
    u = np.random.default_rng(seed).random((1, 2))
    plain = draw(behaviour_of("gaussian", "none", (LOW, HIGH), 0.0, 1, mean, std), u)
    normal = stats.norm(np.float32(mean), np.exp(np.float32(np.log(std))))
    raw = float(plain.raw[0, 0])
    assert plain.raw_log_prob[0] == pytest.approx(normal.logpdf(raw), abs=1e-6)
    at = {-1: normal.logcdf(LOW), 0: normal.logpdf(raw), 1: normal.logsf(HIGH)}[int(plain.at_bound[0, 0])]
    assert plain.log_propensity[0] == pytest.approx(at, abs=1e-6)
    squashed = draw(behaviour_of("squashed_gaussian", "none", (LOW, HIGH), 0.0, 1, mean, std), u)
    raw = float(squashed.raw[0, 0])
    slope = np.log((HIGH - LOW) / 2) - 2 * np.log(np.cosh(raw))
    assert squashed.kinds == ("density",)
    assert squashed.log_propensity[0] == pytest.approx(normal.logpdf(raw) - slope, abs=1e-6)


def test_a_squashed_draw_never_reaches_an_end_that_it_cannot_and_its_density_stays_finite() -> None:
    for mean, end in ((60.0, HIGH), (-60.0, LOW)):
        drawn = draw(behaviour_of("squashed_gaussian", "none", (LOW, HIGH), 0.0, 1, mean, 0.1), np.array([[0.9, 0.5]]))
        assert drawn.actions[0, 0] != end
        assert drawn.actions[0, 0] == pytest.approx(end)
        assert (drawn.kinds, bool(np.isfinite(drawn.log_propensity[0]))) == (("density",), True)


def test_a_coordinate_at_an_end_and_one_between_are_mixed() -> None:
    transform = Transform.of("gaussian", "none", Box((0.0, 0.0), (1.0, 1.0)))
    target = Gaussian(np.array([[9.0, 0.5]]), np.array([[0.1, 0.1]]), np.array([False]))
    box = np.zeros((1, 2)), np.ones((1, 2))
    drawn = draw(behave(target, transform, box, np.zeros(1), None, np.zeros((1, 2))), np.array([[0.9, 0.5, 0.5]]))
    assert (drawn.kinds, drawn.at_bound.tolist()) == (("mixed",), [[1, 0]])
    assert np.isnan(drawn.propensity[0])
    assert drawn.log_propensity[0] == pytest.approx(stats.norm(0.5, 0.1).logpdf(0.5))


@pytest.mark.parametrize(
    ("target", "box"),
    [
        (gaussian(np.array([[np.nan, 0.0]], np.float32), "gaussian"), (0.0, 1.0)),
        (gaussian(np.array([[0.0, 1e4]], np.float32), "gaussian"), (0.0, 1.0)),  # an infinite deviation
        (gaussian(np.array([[0.0, 0.0]], np.float32), "gaussian"), (1.0, 0.0)),  # an empty box
    ],
    ids=["nan", "wide", "empty"],
)
def test_without_an_answer_or_room_the_fallback_has_all_mass(target: Gaussian, box: tuple[float, float]) -> None:
    transform = Transform.of("gaussian", "none", Box((-9.0,), (9.0,)))
    ends = np.array([[box[0]]]), np.array([[box[1]]])
    behaviour = behave(target, transform, ends, np.ones(1), np.ones(1), np.array([[7.0]]))
    drawn = draw(behaviour, np.array([[0.0, 0.3]]))
    assert (behaviour.fallback.tolist(), behaviour.epsilon.tolist()) == ([True], [0.0])
    assert (drawn.actions.tolist(), drawn.propensity.tolist(), drawn.explored.tolist()) == ([[7.0]], [1.0], [False])
    assert drawn.kinds == ("mass",)
    assert behaviour.probabilities.shape == (1, 0)


@pytest.mark.parametrize(("head", "declared"), HEADS)
def test_the_proposal_is_the_own_draw_and_masked_mass_what_the_rules_cut_off(head: str, declared: str) -> None:
    count, cut = 20_000, (-1.0, 1.0)
    behaviour = behaviour_of(head, declared, cut, 0.0, count)
    u = uniforms(KEY, [f"{i:08x}" for i in range(count)], 2)
    proposed = propose(behaviour, u)
    lost = masked_mass(behaviour.target, behaviour.transform, (behaviour.low, behaviour.high))
    outside = ((proposed < cut[0]) | (proposed > cut[1])).mean()
    assert lost[0] == pytest.approx(outside, abs=0.02)
    free = behaviour_of(head, declared, (LOW, HIGH), 0.0)
    assert masked_mass(free.target, free.transform, (free.low, free.high)).tolist() == [0.0]
    np.testing.assert_array_equal(draw(free, u[:1]).actions, propose(free, u[:1]))


def test_distribution_holds_means_and_deviations() -> None:
    wanted = gaussian(np.array([[1.0, 2.0, 0.0, 0.0]], np.float32), "gaussian")
    assert wanted.distribution.tolist() == [[1.0, 2.0, 1.0, 1.0]]
