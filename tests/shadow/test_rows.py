"""Logged decisions become rows, mixtures and models: what is refused, what is cut, what is seen by whom."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from shadow.mixture import episode, single
from shadow.regression import Model
from shadow.rows import Choices, Rows, Step, Unit, assemble

HALVES = np.array([0.5, 0.5])


def choices(**changes: Any) -> Choices:
    columns: dict[str, Any] = {
        "actions": np.array([0, 1]),
        "targets": np.array([[1.0, 0.0], [0.25, 0.75]]),
        "behaviours": np.array([[0.5, 0.5], [0.0, 1.0]]),
        "features": np.array([[1.0], [2.0]]),
    }
    return Choices(**{**columns, **changes})


def columns(**changes: Any) -> dict[str, Any]:
    return {
        "names": ("a", "b"),
        "starts": np.array([0, 1]),
        "targets": np.array([1.0, 0.75]),
        "propensities": np.array([0.5, 1.0]),
        "rewards": np.array([1.0, 2.0]),
        "unsupported": np.array([0.0, 0.25]),
        "disagrees": np.zeros(2, np.bool_),
        "matched": np.zeros(2, np.bool_),
        "known": np.ones(2, np.bool_),
        "choices": choices(),
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rewards": np.zeros(3)}, "different lengths"),
        ({"known": np.ones(1, np.bool_)}, "different lengths"),
        ({"names": (), "starts": np.zeros(0, np.int64), "known": np.zeros(0, np.bool_)}, "units begin"),
        ({"starts": np.array([1, 1])}, "units begin"),
        ({"starts": np.array([0, 3])}, "units begin"),
        ({"rewards": np.array([1.0, np.nan])}, "each row needs a reward"),
        ({"propensities": np.array([0.5, 0.0])}, "each row needs a reward"),
        ({"propensities": np.array([0.5, 1.1])}, "each row needs a reward"),
        ({"targets": np.array([1.0, -0.1])}, "lie in"),
        ({"unsupported": np.array([0.0, np.nan])}, "lie in"),
        ({"choices": choices(behaviours=np.ones((2, 3)) / 3.0)}, "different shapes"),
        ({"choices": choices(actions=np.array([0]))}, "different shapes"),
        ({"choices": choices(features=np.zeros(2))}, "features"),
        ({"choices": choices(features=np.array([[1.0], [np.inf]]))}, "features"),
        ({"choices": choices(values=np.zeros((2, 3)))}, "values"),
        ({"choices": choices(values=np.full((2, 2), np.nan))}, "values"),
        ({"choices": choices(actions=np.array([0, 2]))}, "does not exist"),
        ({"choices": choices(targets=np.array([[1.0, 0.1], [0.25, 0.75]]))}, "distributions"),
        ({"choices": choices(targets=np.array([[1.5, -0.5], [0.25, 0.75]]))}, "distributions"),
        ({"targets": np.array([0.9, 0.75])}, "not what its distribution says"),
        ({"propensities": np.array([0.4, 1.0])}, "not what its distribution says"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], said: str) -> None:
    Rows(**columns())
    with pytest.raises(ValueError, match=said):
        Rows(**columns(**changes))


def test_support_and_agreement_follow_from_distributions() -> None:
    rows = Rows.chosen(["a", "b"], [0, 1], [1.0, 2.0], choices(), champion=[1, -1])
    assert rows.unsupported.tolist() == [0.0, 0.25]
    assert (rows.targets.tolist(), rows.propensities.tolist()) == ([1.0, 0.75], [0.5, 1.0])
    assert (rows.disagrees.tolist(), rows.matched.tolist()) == ([True, False], [True, False])
    same = Rows.chosen(["a", "b"], [0, 1], [1.0, 2.0], choices(), champion=[0, 0])
    assert (same.disagrees.tolist(), same.matched.tolist()) == ([False, True], [False, True])
    missed = Rows.chosen(["a"], [0, 1][:1], [1.0, 2.0], choices(targets=np.tile([0.0, 1.0], (2, 1))), champion=[0, 0])
    assert (missed.disagrees.tolist(), missed.matched.tolist()) == ([True, True], [False, True])
    assert missed.lengths.tolist() == [2]


def test_parts() -> None:
    rows = Rows(**columns(choices=choices(values=np.zeros((2, 2)))))
    part = rows.part(1, 2)
    assert (part.names, part.starts.tolist(), part.rewards.tolist()) == (("b",), [0], [2.0])
    assert part.choices is not None
    assert part.choices.values is not None
    assert part.choices.actions.tolist() == [1]
    assert Rows(**columns(choices=None)).part(0, 1).choices is None


# -- one by one


def step(number: int, **changes: Any) -> Step:
    settings: dict[str, Any] = {"step": number, "target": 0.5, "propensity": 0.5, "reward": 1.0}
    return Step(**{**settings, **changes})


def test_an_episode_is_cut_where_it_is_not_known_any_more() -> None:
    whole = [step(0), step(1), step(2)]
    cases = [
        (Unit("whole", whole), 3, True),
        (Unit("lost", whole, whole=False), 3, False),
        (Unit("hole", [step(0), step(2)]), 1, False),
        (Unit("beginning", [step(1)]), 0, False),
        (Unit("switched", [step(0), step(1, switched=True), step(2)]), 1, False),
        (Unit("taken over", [step(0, switched=True), step(1)]), 2, True),
        (Unit("voided", [step(0), step(1), step(2, reward=None)]), 2, False),
        (Unit("unknown", [step(0), step(1, propensity=None), step(2)]), 1, False),
        (Unit("nothing", []), 0, False),
    ]
    rows = assemble([unit for unit, _, _ in cases], sequential=True)
    assert rows.lengths.tolist() == [length for _, length, _ in cases]
    assert rows.known.tolist() == [known for _, _, known in cases]
    assert rows.names[2] == "hole"


def test_a_key_keeps_the_decisions_that_are_known() -> None:
    unit = Unit("key", [step(0, reward=None), step(0, disagrees=True, matched=True), step(0, switched=True)])
    rows = assemble([unit, Unit("other", [step(7)])], sequential=False)
    assert (rows.lengths.tolist(), rows.known.tolist()) == ([2, 1], [False, True])
    assert (rows.disagrees.tolist(), rows.matched.tolist()) == ([True, False, False], [True, False, False])


def test_columns_of_a_model_are_there_only_if_each_step_has_them() -> None:
    full = {"action": 1, "targets": HALVES, "behaviours": HALVES, "features": np.zeros(3)}
    told = assemble([Unit("a", [step(0, **full), step(1, **full)])], sequential=True).choices
    assert told is not None
    assert (told.targets.shape, told.features.shape, told.values) == ((2, 2), (2, 3), None)
    owned = assemble([Unit("a", [step(0, **full, values=np.zeros(2))])], sequential=True).choices
    assert owned is not None
    assert owned.values is not None
    assert assemble([Unit("a", [step(0, **full), step(1)])], sequential=True).choices is None
    assert assemble([], sequential=True).choices is None


# -- mixtures


def test_a_mixture_takes_rows_that_all_versions_scored() -> None:
    own = np.array([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1]])
    scored = np.array([[[0.9, 0.1], [0.5, 0.5]], [[0.9, 0.1], [np.nan, np.nan]], [[0.9, 0.1], [np.nan, np.nan]]])
    weights = np.array([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]])
    assert single(own, scored, weights) == pytest.approx(np.array([[0.7, 0.3], [0.9, 0.1], [0.9, 0.1]]))
    assert single(own, None, weights) is own


def test_an_episodes_mixture_by_hand() -> None:
    """Two versions, half each. After action 1 (0.1 against 0.5) the second is five times as probable."""
    own = np.tile([0.9, 0.1], (4, 1))
    scored = np.tile([[0.9, 0.1], [0.5, 0.5]], (4, 1, 1))
    scored[3, 1] = np.nan
    found = episode(own, scored, HALVES, np.array([1, 0, 0, 0]))
    assert found[0] == pytest.approx([0.7, 0.3])
    assert found[1] == pytest.approx([(0.1 * 0.9 + 0.5 * 0.5) / 0.6, (0.1 * 0.1 + 0.5 * 0.5) / 0.6])
    assert found[3] == pytest.approx([0.9, 0.1])
    path = 0.5 * 0.1 * 0.9 * 0.9 + 0.5 * 0.5 * 0.5 * 0.5
    assert found[0, 1] * found[1, 0] * found[2, 0] == pytest.approx(path)
    assert episode(own, None, HALVES, np.zeros(4, np.int64)) is own
    with pytest.raises(ValueError, match="step 0"):
        episode(own, np.tile([[1.0, 0.0]], (4, 1, 1)), np.ones(1), np.ones(4, np.int64))


# -- the model


def data(n: int, rng: np.random.Generator) -> tuple[Choices, Any]:
    """y depends on the action and on one of two features; the version's own q is a thousand times too large."""
    features, actions = rng.normal(size=(n, 2)) * [1.0, 1e-3] + [0.0, 50.0], rng.integers(0, 2, n)
    truth = np.stack([1.0 + features[:, 0], 2.0 - features[:, 0]], axis=1)
    shares = np.full((n, 3), 1.0 / 3.0)
    values = np.concatenate([1e3 * truth, np.full((n, 1), 7e5)], axis=1)
    y = truth[np.arange(n), actions] + 0.1 * rng.normal(size=n)
    return Choices(actions, shares, shares, features, values), y


def test_it_predicts_what_was_logged_whatever_the_units_of_its_regressors() -> None:
    rng = np.random.default_rng(1)
    logged, y = data(2_000, rng)
    fresh = Model.fresh(folds=5, actions=3, features=2, own_values=True)
    names = [f"key-{i // 2}" for i in range(2_000)]
    folds = fresh.fold_of(names)
    assert np.bincount(folds).min() > 300
    model = fresh.learn(logged, y, folds, folds)
    predicted = model.predict(logged, folds)
    truth = np.stack([1.0 + logged.features[:, 0], 2.0 - logged.features[:, 0]], axis=1)
    assert np.abs(predicted[:, :2] - truth).max() < 0.1
    assert predicted[:, 2] == pytest.approx(y.mean(), abs=0.1)  # never seen: the mean, whatever its q says
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(model), type=Model) == model


def test_predictions_for_a_fold_do_not_know_its_rewards() -> None:
    logged, y = data(300, np.random.default_rng(2))
    fresh = Model.fresh(folds=3, actions=3, features=2, own_values=True)
    folds = np.arange(300) % 3
    one = fresh.learn(logged, y, folds, folds)
    other = fresh.learn(logged, np.where(folds == 1, -9.0, y), folds, folds)
    same = one.predict(logged, folds) == other.predict(logged, folds)
    assert same[folds == 1].all()
    assert not same[folds == 0].any()
    assert one.seen(np.array([0, 1, 2])).tolist() == [200, 200, 200]


def test_a_model_of_nothing_predicts_nothing_and_odd_ones_are_refused() -> None:
    logged, y = data(4, np.random.default_rng(3))
    fresh = Model.fresh(folds=2, actions=3, features=2, own_values=True)
    assert not fresh.predict(logged, np.zeros(4, np.int64)).any()
    constant = fresh.learn(logged.part(slice(0, 1)), y[:1], np.zeros(1, np.int64), np.zeros(1, np.int64))
    assert constant.predict(logged, np.ones(4, np.int64)) == pytest.approx(np.full((4, 3), y[0]))
    with pytest.raises(ValueError, match="expected"):
        Model.fresh(folds=2, actions=3, features=1, own_values=True).predict(logged, np.zeros(4, np.int64))
    for options in ({"folds": 1}, {"actions": 0}, {"features": -1}):
        with pytest.raises(ValueError, match="a model needs"):
            Model.fresh(**{"folds": 2, "actions": 2, "features": 1, "own_values": False, **options})  # type: ignore
