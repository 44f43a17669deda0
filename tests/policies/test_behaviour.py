"""The maths between a network's outputs and an action: every property holds for every head, mask and ε."""

from __future__ import annotations

from dataclasses import astuple, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from policies.draw import draw, invert, uniforms
from policies.explore import behave, masked_mass, softmax_weights
from policies.heads import index_rows, target
from policies.types import HeadKind, Target

KEY = bytes(range(32))
Case = tuple[Target, np.ndarray, np.ndarray, np.ndarray]


HEADS: tuple[HeadKind, ...] = ("q_values", "logits", "probabilities", "action")


@st.composite
def cases(draw_from: st.DrawFn) -> Case:
    """A target from any head (NaN and infinities among the outputs), a mask, an ε and a fallback for each row."""
    rows = draw_from(st.integers(1, 4))
    n = draw_from(st.integers(1, 6))
    head: HeadKind = draw_from(st.sampled_from(HEADS))
    numbers = st.one_of(st.floats(-50, 50, width=32), st.sampled_from([np.nan, np.inf, -np.inf, 0.0]))
    outputs = draw_from(hnp.arrays(np.float32, (rows, n), elements=numbers))
    if head == "probabilities" and draw_from(st.booleans()):
        weights = np.abs(np.nan_to_num(outputs, posinf=1, neginf=1)) + 0.01
        outputs = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    if head == "action" and draw_from(st.booleans()):
        outputs = index_rows(draw_from(hnp.arrays(np.int64, rows, elements=st.integers(-1, n))), [n])
    temperature = draw_from(st.sampled_from([None, 0.5, 3.0])) if head != "probabilities" else None
    mask = draw_from(hnp.arrays(np.bool_, (rows, n)))
    epsilon = draw_from(hnp.arrays(np.float64, rows, elements=st.floats(0, 1)))
    fallback = draw_from(hnp.arrays(np.int64, rows, elements=st.integers(0, n - 1)))
    return target(outputs, head, temperature), mask, epsilon, fallback


def enumerate_row(wanted: Target, mask: np.ndarray, epsilon: float, fallback: int, row: int) -> list[float]:
    """The definition, one action at a time: an independent, slow re-implementation."""
    n = mask.shape[1]
    allowed = [a for a in range(n) if mask[row, a]]
    scores = [float(x) for x in wanted.scores[row]]
    fallen = [1.0 if a == fallback else 0.0 for a in range(n)]
    if wanted.faulty[row] or not allowed:
        return fallen
    if wanted.greedy:
        best = max(allowed, key=lambda a: (scores[a], -a))
        own = [1.0 if a == best else 0.0 for a in range(n)]
    else:
        mass = sum(scores[a] for a in allowed)
        if mass == 0:
            return fallen
        own = [scores[a] / mass if a in allowed else 0.0 for a in range(n)]
    return [(1 - epsilon) * own[a] + (epsilon / len(allowed) if a in allowed else 0.0) for a in range(n)]


@given(cases())
@settings(max_examples=400)
def test_behaviour_is_the_definition_enumerated(case: Case) -> None:
    wanted, mask, epsilon, fallback = case
    behaviour = behave(wanted, mask, epsilon, fallback)
    for row in range(len(mask)):
        expected = enumerate_row(wanted, mask, float(epsilon[row]), int(fallback[row]), row)
        np.testing.assert_allclose(behaviour.probabilities[row], expected, atol=1e-12)
    np.testing.assert_allclose(behaviour.probabilities.sum(axis=1), 1.0, atol=1e-9)


@given(cases(), st.lists(st.text("0123456789abcdef", min_size=4, max_size=12), min_size=4, max_size=4))
@settings(max_examples=300)
def test_the_propensity_is_the_behaviour_at_the_drawn_action_and_masked_actions_are_never_drawn(
    case: Case, ids: list[str]
) -> None:
    wanted, mask, epsilon, fallback = case
    behaviour = behave(wanted, mask, epsilon, fallback)
    drawn = draw(behaviour, uniforms(KEY, ids[: len(mask)]))
    for row, action in enumerate(drawn.actions[:, 0]):
        assert drawn.propensity[row] == behaviour.probabilities[row, action] > 0
        assert behaviour.fallback[row] or mask[row, action]
        if behaviour.fallback[row]:
            assert (action, drawn.propensity[row], drawn.explored[row]) == (fallback[row], 1.0, False)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_drawn_frequencies_agree_with_the_propensities(head: HeadKind, epsilon: float) -> None:
    outputs = np.array([[0.1, 0.5, 0.2, 0.2]], dtype=np.float32)
    if head == "action":
        outputs = index_rows(np.array([1]), [4])
    mask = np.array([[True, True, False, True]])
    count = 20_000
    behaviour = behave(
        target(np.repeat(outputs, count, axis=0), head),
        np.repeat(mask, count, axis=0),
        np.full(count, epsilon),
        np.zeros(count, dtype=np.int64),
    )
    drawn = draw(behaviour, uniforms(KEY, [f"{i:08x}" for i in range(count)]))
    observed = np.bincount(drawn.actions[:, 0], minlength=4)
    expected = behaviour.probabilities[0] * count
    assert observed[expected == 0].sum() == 0
    keep = expected > 0
    if keep.sum() > 1:
        # The ids are fixed, so this is one draw of a chi-square test, not a flaky one.
        assert stats.chisquare(observed[keep], expected[keep]).pvalue > 1e-3
    assert abs(drawn.explored.mean() - epsilon) < 0.01


def test_the_worked_example_of_the_design() -> None:
    """M = {hold, up_1}, greedy up_1, ε = 0.05: 0.95 + 0.05 / 2."""
    q = np.array([[1.0, 2.0, 3.0]], dtype=np.float32)
    behaviour = behave(
        target(q, "q_values"), np.array([[True, True, False]]), np.array([0.05]), np.array([0], dtype=np.int64)
    )
    np.testing.assert_allclose(behaviour.probabilities, [[0.025, 0.975, 0.0]], atol=1e-15)


def test_a_greedy_tie_goes_to_the_lowest_index() -> None:
    tied = target(np.array([[1.0, 1.0, 1.0]], dtype=np.float32), "q_values")
    behaviour = behave(tied, np.array([[False, True, True]]), np.array([0.0]), np.array([0], dtype=np.int64))
    assert behaviour.own.tolist() == [[0.0, 1.0, 0.0]]


def test_no_target_mass_on_the_mask_falls_back_and_is_never_filled_with_uniform() -> None:
    certain = target(np.array([[1.0, 0.0, 0.0]], dtype=np.float32), "probabilities")
    behaviour = behave(certain, np.array([[False, True, True]]), np.array([0.5]), np.array([2], dtype=np.int64))
    assert behaviour.fallback.tolist() == [True]
    assert behaviour.probabilities.tolist() == [[0.0, 0.0, 1.0]]
    assert behaviour.epsilon.tolist() == [0.0]


def test_a_network_that_names_one_action_falls_back_where_that_action_is_masked() -> None:
    only = target(index_rows(np.array([1]), [3]), "action")
    free = behave(only, np.array([[True, True, True]]), np.array([0.3]), np.array([2], dtype=np.int64))
    np.testing.assert_allclose(free.probabilities, [[0.1, 0.8, 0.1]])
    masked = behave(only, np.array([[True, False, True]]), np.array([0.3]), np.array([2], dtype=np.int64))
    assert (masked.fallback.tolist(), masked.probabilities.tolist()) == ([True], [[0.0, 0.0, 1.0]])


def test_temperature_turns_values_into_a_softmax() -> None:
    soft = target(np.array([[1.0, 2.0]], dtype=np.float32), "q_values", 0.5)
    np.testing.assert_allclose(soft.scores, [np.exp([2, 4]) / np.exp([2, 4]).sum()])
    assert not soft.greedy


def test_a_probabilities_head_that_is_no_distribution_is_faulty() -> None:
    rows = np.array([[0.5, 0.5], [0.9, 0.3], [-0.1, 1.1]], dtype=np.float32)
    assert target(rows, "probabilities").faulty.tolist() == [False, True, True]


def test_masked_mass_is_what_the_mask_took_from_the_target() -> None:
    wanted = target(np.array([[0.2, 0.3, 0.5]], dtype=np.float32), "probabilities")
    np.testing.assert_allclose(masked_mass(wanted, np.array([[True, False, False]])), [0.8], atol=1e-7)
    greedy = target(np.array([[0.2, 0.3, 0.5], [np.nan, 0, 0]], dtype=np.float32), "q_values")
    assert masked_mass(greedy, np.array([[True, True, False]] * 2)).tolist() == [1.0, 0.0]


def test_inversion_never_takes_an_action_without_mass_at_the_edges() -> None:
    distribution = np.array([[0.0, 0.5, 0.5, 0.0]] * 3)
    assert invert(distribution, np.array([0.0, 0.5, np.nextafter(1.0, 0.0)])).tolist() == [1, 2, 2]


def test_uniforms_depend_on_key_and_id_alone() -> None:
    one = uniforms(KEY, ["aa", "bb"])
    assert (uniforms(KEY, ["bb"]) == one[1]).all()
    assert (uniforms(bytes(32), ["bb"]) != one[1]).all()
    assert ((one >= 0) & (one < 1)).all()


def test_a_mask_applies_before_the_softmax_so_no_mass_is_lost() -> None:
    wanted = target(np.array([[2000.0, 1.0, 1.0]], dtype=np.float32), "logits")
    behaviour = behave(wanted, np.array([[False, True, True]]), np.array([0.0]), np.array([0]))
    assert behaviour.probabilities.tolist() == [[0.0, 0.5, 0.5]]
    assert not behaviour.fallback[0]


@pytest.mark.parametrize("head", ["q_values", "logits", "probabilities", "action"])
@pytest.mark.parametrize("epsilon", [0.0, 0.3])
def test_several_factors_are_drawn_together_with_the_probability_of_the_joint_action(
    head: HeadKind, epsilon: float
) -> None:
    """The joint distribution, enumerated: (1 - ε) · Π own + ε · Π uniform, against 40,000 draws."""
    nvec, count = (3, 2), 40_000
    outputs = np.array([[0.2, 0.3, 0.5, 0.6, 0.4]], dtype=np.float32)
    if head == "action":
        outputs = index_rows(np.array([[1, 0]]), nvec)
    mask = np.array([[True, True, False, True, True]])
    wanted = target(np.repeat(outputs, count, axis=0), head, None, nvec)
    behaviour = behave(wanted, np.repeat(mask, count, axis=0), np.full(count, epsilon), np.zeros((count, 2), np.int64))
    drawn = draw(behaviour, uniforms(KEY, [f"{i:08x}" for i in range(count)], 3))
    own, uniform = behaviour.own[0], behaviour.exploring[0]
    joint = (1 - epsilon) * np.outer(own[:3], own[3:]) + epsilon * np.outer(uniform[:3], uniform[3:])
    assert joint.sum() == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose(drawn.propensity, joint[drawn.actions[:, 0], drawn.actions[:, 1]], atol=1e-12)
    observed = np.bincount(drawn.actions[:, 0] * 2 + drawn.actions[:, 1], minlength=6)
    keep = joint.ravel() > 0
    assert observed[~keep].sum() == 0
    if keep.sum() > 1:
        assert stats.chisquare(observed[keep], joint.ravel()[keep] * count).pvalue > 1e-3


def test_masked_mass_of_several_factors_is_that_of_the_joint_action() -> None:
    wanted = target(np.array([[0.5, 0.5, 0.25, 0.75]], dtype=np.float32), "probabilities", None, (2, 2))
    mask = np.array([[True, False, True, True]])
    assert masked_mass(wanted, mask).tolist() == pytest.approx([0.5])
    assert behave(wanted, mask & [True, True, False, False], np.array([0.5]), np.array([[1, 1]])).fallback.all()


@given(cases(), st.data())
@settings(max_examples=300)
def test_the_exploring_part_is_in_proportion_to_its_weights_within_the_mask(case: Case, data: st.DataObject) -> None:
    wanted, mask, epsilon, fallback = case
    weight = st.sampled_from([0.0, 0.5, 1.0, 3.0])
    weights = np.array([[data.draw(weight) for _ in row] for row in mask])
    behaviour = behave(wanted, mask, epsilon, fallback, weights)
    plain = behave(wanted, mask, epsilon, fallback)
    for row in range(len(mask)):
        within = [float(w) if m else 0.0 for w, m in zip(weights[row], mask[row], strict=True)]
        own = plain.own[row]
        strength = float(epsilon[row]) if sum(within) > 0 and not plain.fallback[row] else 0.0
        exploring = [w / sum(within) for w in within] if strength else own
        expected = [(1 - strength) * o + strength * x for o, x in zip(own, exploring, strict=True)]
        np.testing.assert_allclose(behaviour.probabilities[row], expected, atol=1e-12)
        assert behaviour.epsilon[row] == strength


def test_softmax_exploration_is_softmax_over_what_is_allowed() -> None:
    wanted = target(np.array([[1.0, 2.0, 3.0]], dtype=np.float32), "q_values")
    mask = np.array([[True, True, False]])
    weights = softmax_weights(wanted, mask, np.array([0.5]))
    behaviour = behave(wanted, mask, np.array([0.1]), np.array([0]), weights)
    rest = 1 / (1 + np.exp(2.0))
    np.testing.assert_allclose(behaviour.exploring, [[rest, 1 - rest, 0.0]], atol=1e-12)
    np.testing.assert_allclose(behaviour.probabilities, [[0.1 * rest, 0.9 + 0.1 * (1 - rest), 0.0]], atol=1e-12)


@pytest.mark.parametrize(
    ("outputs", "head", "expected"),
    [
        ([[0.0, np.log(3.0), 9.0]], "logits", [0.25, 0.75, 0.0]),
        ([[0.25, 0.75, 0.0]], "probabilities", [0.25, 0.75, 0.0]),
        ([[0.0, 0.0, 1.0]], "probabilities", [0.0, 0.0, 0.0]),  # no logarithm to go by: nothing is explored
        ([[np.nan, 0.0, 0.0]], "q_values", [0.0, 0.0, 0.0]),
    ],
)
def test_softmax_exploration_of_every_head(outputs: list[list[float]], head: HeadKind, expected: list[float]) -> None:
    wanted = target(np.array(outputs, dtype=np.float64), head)
    weights = softmax_weights(wanted, np.array([[True, True, False]]), np.array([1.0]))
    np.testing.assert_allclose(weights, [expected], atol=1e-9)


def test_a_frozen_row_takes_the_mode_within_the_mask() -> None:
    wanted = target(np.tile(np.log([[0.2, 0.5, 0.3]]), (3, 1)), "logits")
    mask = np.array([[True, False, True], [True, False, True], [False, False, False]])
    frozen = np.array([True, False, True])
    behaviour = behave(wanted, mask, np.zeros(3), np.array([1, 1, 1]), frozen=frozen)
    np.testing.assert_allclose(behaviour.own, np.array([[0, 0, 1], [0.4, 0, 0.6], [0, 1, 0]]), atol=1e-12)
    assert behaviour.fallback.tolist() == [False, False, True]


UNIFORM = st.one_of(st.floats(0.0, 1.0, exclude_max=True), st.sampled_from([0.0, 1.0 - 2.0**-53]))


@given(cases(), st.lists(st.tuples(UNIFORM, UNIFORM), min_size=4, max_size=4))
@settings(max_examples=300)
def test_what_is_certain_is_drawn_as_by_its_distribution(case: Case, uniform: list[tuple[float, float]]) -> None:
    wanted, mask, epsilon, fallback = case
    behaviour, u = behave(wanted, mask, epsilon, fallback), np.array(uniform[: len(mask)])
    assert behaviour.certain == wanted.greedy
    quick, whole = draw(behaviour, u), draw(replace(behaviour, certain=False), u)
    for one, other in zip(astuple(quick), astuple(whole), strict=True):
        np.testing.assert_array_equal(one, other)


@given(cases())
def test_the_mass_that_a_mask_takes_is_what_the_distribution_has_there(case: Case) -> None:
    wanted, mask, _, _ = case
    expected = (wanted.distribution * ~mask).sum(axis=1)
    np.testing.assert_allclose(masked_mass(wanted, mask), expected, atol=1e-12)


def test_a_faulty_row_has_no_mass_that_a_mask_could_take() -> None:
    wanted = target(np.array([[np.nan, 1.0], [2.0, 1.0]], dtype=np.float32), "q_values")
    assert masked_mass(wanted, np.array([[False, True], [False, True]])).tolist() == [0.0, 1.0]
