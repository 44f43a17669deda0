"""Rewards predicted from what was logged: ridge regression by action, never from the fold that it predicts. Pure.

Duty: sums that can be added to and kept, and predictions for rows of a fold from the sums of all other folds. It knows
no importance weight, no estimate and no interval.
Strategy: y is centred on its mean and regressed on the features, for each action by itself; the version's own q, where
given, is one more regressor, so that its scale, offset and errors are judged by logged rewards alone. The penalty is
one row's worth of each regressor's variance: it does not depend on units, and an action that was never seen is
predicted by the mean. A doubly robust estimate needs no right model, only one that has not seen what it predicts.
Source: Hoerl and Kennard 1970 (ridge); Chernozhukov et al. 2018, "Double/debiased machine learning", definition 3.1
(folds), here of whole keys or episodes, since rows of one key resemble each other.
Promise: predictions for a name depend on no reward of the name's fold, and on nothing that is added later.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import msgspec
import numpy as np

from policies.types import Floats, Ints
from shadow.rows import Choices


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """Sums by fold and action; p = 1 + features (+ 1 with own values).

    gram: float64 [F, A, p, p], Σ z·zᵀ with z = (1, x, q_a). moment: float64 [F, A, p], Σ z·y. units: by fold.
    """

    actions: int
    width: int
    gram: bytes
    moment: bytes
    units: tuple[int, ...]

    @classmethod
    def fresh(cls, *, folds: int, actions: int, features: int, own_values: bool) -> Model:
        """Of nothing yet. Raises ValueError for fewer than two folds, or no actions."""
        if folds < 2 or actions < 1 or features < 0:
            raise ValueError("a model needs two folds and an action at least")
        p = 1 + features + own_values
        gram, moment = np.zeros((folds, actions, p, p)), np.zeros((folds, actions, p))
        return cls(actions=actions, width=p, gram=gram.tobytes(), moment=moment.tobytes(), units=(0,) * folds)

    @property
    def folds(self) -> int:
        return len(self.units)

    def fold_of(self, names: Sequence[str]) -> Ints:
        """The fold of each name, int64 [k]: the same in every process and for ever."""
        digests = (blake2b(name.encode(), digest_size=8, person=b"sf-fold").digest() for name in names)
        return np.array([int.from_bytes(each, "big") % self.folds for each in digests], np.int64)

    def seen(self, folds: Ints) -> Ints:
        """How many units speak about each of these folds: those of all others, int64 [k]."""
        return np.asarray(sum(self.units) - np.array(self.units, np.int64)[folds])

    def learn(self, choices: Choices, y: Floats, row_folds: Ints, unit_folds: Ints) -> Model:
        """Add rows with what is to be predicted, float64 [n], and count their units."""
        gram, moment = self._sums()
        own = self._table(choices)[np.arange(len(y)), choices.actions]
        for fold, action in {*zip(row_folds.tolist(), choices.actions.tolist(), strict=True)}:
            rows = (row_folds == fold) & (choices.actions == action)
            gram[fold, action] += own[rows].T @ own[rows]
            moment[fold, action] += own[rows].T @ y[rows]
        units = np.array(self.units) + np.bincount(unit_folds, minlength=self.folds)
        return msgspec.structs.replace(self, gram=gram.tobytes(), moment=moment.tobytes(), units=tuple(units.tolist()))

    def predict(self, choices: Choices, row_folds: Ints) -> Floats:
        """Predict y for each action, float64 [n, A], from the other folds."""
        gram, moment = self._sums()
        table, predicted = self._table(choices), np.zeros(choices.targets.shape)
        for fold in np.unique(row_folds):
            rows, others = row_folds == fold, np.arange(self.folds) != fold
            slopes = _solve(gram[others].sum(axis=0), moment[others].sum(axis=0))
            predicted[rows] = np.einsum("nap,ap->na", table[rows], slopes)
        return predicted

    def _sums(self) -> tuple[Floats, Floats]:
        shape = (self.folds, self.actions, self.width)
        gram = np.frombuffer(self.gram).reshape(*shape, self.width)
        return gram.copy(), np.frombuffer(self.moment).reshape(shape).copy()

    def _table(self, choices: Choices) -> Floats:
        """z for each row and action, float64 [n, A, p]. Raises ValueError where the model is for other columns."""
        n, columns = len(choices.actions), [np.ones((len(choices.actions), 1)), choices.features]
        shared = np.concatenate(columns, axis=1)
        table = np.repeat(shared[:, None, :], choices.targets.shape[1], axis=1)
        if choices.values is not None:
            table = np.concatenate([table, choices.values[:, :, None]], axis=2)
        if table.shape != (n, self.actions, self.width):
            raise ValueError(f"{table.shape[1:]} actions and regressors, {(self.actions, self.width)} expected")
        return table


def _solve(gram: Floats, moment: Floats) -> Floats:
    """Slopes by action, float64 [A, p], towards the mean of y over all actions."""
    count, sums = gram[:, 0, 0].sum(), gram[:, 0].sum(axis=0)
    if count == 0.0:
        return np.zeros(moment.shape)
    mean_y, means = moment[:, 0].sum() / count, sums / count
    centre = np.eye(len(means))
    centre[1:, 0] = -means[1:]  # z -> (1, x - mean x)
    spread = np.einsum("aii->i", centre @ gram @ centre.T) / count
    centre /= np.sqrt(np.where(spread > 0.0, spread, 1.0))[:, None]  # variance one, as is the penalty
    right = (moment - mean_y * gram[:, 0]) @ centre.T
    slopes = np.linalg.solve(centre @ gram @ centre.T + np.eye(len(means)), right[:, :, None])[:, :, 0] @ centre
    slopes[:, 0] += mean_y
    return np.asarray(slopes)
