"""The value of a version that need not decide, from what others did: sums that are kept, and estimates read off. Pure.

Duty: take logged units in the order in which they started, in batches of any size; give, at any time, estimates with
errors, intervals, bounds that stay valid while someone watches, and what says whether to trust them. It knows no stream
and no verdict (`gate.py` has that).
Strategy: estimators follow the objective. `step`: each row is a path of one step, a unit is a key with its first rows,
and values are means over rows. `episode`: each unit is a path, and values are means over episodes. Units are
independent, rows of a unit need not be: every error is computed over units. The model is fitted on earlier units of
other folds alone, so that the same numbers are good for a peek at any time and for the end.
Sources: IPS, Horvitz and Thompson 1952; SNIPS, Swaminathan and Joachims 2015; DR, Dudík, Langford and Li 2011; PDIS,
Precup, Sutton and Singh 2000; weighted PDIS in its consistent form ("CWPDIS"), Thomas 2015, "Safe reinforcement
learning"; recursive DR, Jiang and Li 2016, eq. 10.
Promise: sums of bounded size; the mass of the target that the log does not support is at its worst in every value and
lower bound, at its best in every upper one, and never filled in by a model.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np

from policies.types import Bools, Floats
from shadow.estimate import Estimate, Estimates, Method, OneStepAdvantage, Support
from shadow.lower_bound import LowerBound
from shadow.moments import ByStep, Figure, Moments
from shadow.paths import Paths, Range, by_row, walk
from shadow.regression import Model
from shadow.rows import Rows

_VALUE, _ROWS, _MASS, _LEFT = 0, 1, 2, 3  # numbers of a unit


class ModelTerms(msgspec.Struct, frozen=True, kw_only=True):
    """What the model of the doubly robust estimates is given. actions, features: as `Choices` has them.

    warm: units of other folds that it must have seen before a unit is estimated with it; those before only teach it.
    debt: of a unit, in spans of the range; more lets the model help where weights are large, less helps few units.
    """

    actions: int
    features: int
    own_values: bool = False
    folds: int = 5
    warm: int = 50
    debt: float = 4.0


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked. returns: the range of a unit's return (`episode`), or of one row's reward (`step`).

    most_rows: of a key that are taken, `step` only: 1 if there are no keys. alpha: probability with which a bound may
    ever fail, for each of the two. level: of the intervals. least_effective: with fewer paths than this to go by there
    is no value, but only bounds: a doubly robust one would be its model's guess, with a small error.
    """

    objective: Literal["step", "episode"]
    returns: Range
    most_rows: int = 1
    alpha: float = 0.01
    level: float = 0.95
    least_effective: float = 10.0
    model: ModelTerms | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for levels that are no probabilities."""
        if not (0.0 < self.alpha < 1.0 and 0.0 < self.level < 1.0):
            raise ValueError("alpha and level lie between 0 and 1")


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of gains above the worst, and of losses below the best."""

    gain: LowerBound
    loss: LowerBound

    @classmethod
    def fresh(cls, terms: Terms, debt: float = 0.0) -> Bounds:
        """Of nothing yet."""
        most, span = terms.most_rows if terms.objective == "step" else 1, terms.returns.span
        one = LowerBound.fresh(span=span, debt=debt * span, most=most)
        return cls(gain=one, loss=one)

    def add(self, gains: Floats, losses: Floats, sizes: Floats) -> Bounds:
        """Add units in their order."""
        some = sizes > 0.0
        return Bounds(gain=self.gain.add(gains[some], sizes[some]), loss=self.loss.add(losses[some], sizes[some]))

    def ends(self, terms: Terms) -> tuple[float, float]:
        """The lower and the upper bound of the value."""
        return terms.returns.low + self.gain.value(terms.alpha), terms.returns.high - self.loss.value(terms.alpha)


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is known of one version; goes through msgspec as it is.

    plain: value, rows, weight + unsupported, unsupported, by unit. doubly: value and rows of the units that a model
    took part in. advantage: one step's, and rows.
    """

    terms: Terms
    plain: Moments
    doubly: Moments
    advantage: Moments
    bounds: Bounds
    doubly_bounds: Bounds
    by_step: ByStep = ByStep()
    model: Model | None = None
    units: int = 0
    rows: int = 0
    left_out: int = 0
    outside: int = 0
    disagreements: int = 0
    matched: int = 0
    weights: float = 0.0
    squares: float = 0.0

    @classmethod
    def fresh(cls, terms: Terms) -> Tally:
        """Of nothing yet. Raises ValueError for terms that do not go together."""
        asked = terms.model
        model = None
        if asked is not None:
            model = Model.fresh(
                folds=asked.folds, actions=asked.actions, features=asked.features, own_values=asked.own_values
            )
        return cls(
            terms=terms,
            plain=Moments.fresh(4),
            doubly=Moments.fresh(2),
            advantage=Moments.fresh(2),
            bounds=Bounds.fresh(terms),
            doubly_bounds=Bounds.fresh(terms, asked.debt if asked is not None else 0.0),
            model=model,
        )

    def add(self, rows: Rows) -> Tally:
        """Add units, in the order in which they started; a unit comes once, when all that will be known of it is.

        Numbers without a model are the same whatever the batches are. A model learns between batches, and large ones
        are cut for its sake. Raises ValueError where the terms ask for a model and rows have no choices.
        """
        if self.model is None:
            return self._added(rows)
        tally, first = self, 0
        while first < len(rows.names):
            size = max(self.terms.model.warm if self.terms.model else 1, tally.units // 2)
            tally = tally._added(rows.part(first, min(first + size, len(rows.names))))
            first += size
        return tally

    def estimates(self) -> Estimates:
        """Read off what is known now, by every method that follows the objective."""
        sequential, support = self.terms.objective == "episode", self._support()
        ends = self.bounds.ends(self.terms)
        plain = self.plain.ratio(_VALUE, _ROWS)
        weighted = self.by_step.figure() if sequential else self.plain.ratio(_VALUE, _MASS)
        methods = [
            self._estimate("pdis" if sequential else "ips", plain, ends, self.plain.units, support),
            self._estimate("wpdis" if sequential else "snips", weighted, ends, self.plain.units, support),
        ]
        if self.model is not None:
            told, ends = self.doubly.ratio(_VALUE, _ROWS), self.doubly_bounds.ends(self.terms)
            name: Method = "recursive_dr" if sequential else "dr"
            methods.append(self._estimate(name, told, ends, self.doubly.units, support))
        return Estimates(
            objective=self.terms.objective,
            methods=tuple(methods),
            support=support,
            one_step_advantage=self._advantage(),
        )

    def _added(self, rows: Rows) -> Tally:
        sequential = self.terms.objective == "episode"
        paths = walk(rows, self.terms.returns, chained=sequential)
        counted = rows.known if sequential else rows.lengths > 0
        mass = paths.weight + paths.unsupported
        return msgspec.structs.replace(
            self._with_model(rows, paths, counted),
            plain=self.plain.add(*(each[counted] for each in (paths.value, paths.size, mass, paths.unsupported))),
            advantage=self.advantage.add(*_advantages(rows, paths)) if sequential else self.advantage,
            bounds=self.bounds.add(paths.gain, paths.loss, paths.size),
            by_step=self.by_step.add(paths.earned[counted], paths.mass[counted]) if sequential else self.by_step,
            units=self.units + len(rows.names),
            rows=self.rows + len(rows.rewards),
            left_out=self.left_out + int((~rows.known).sum()),
            outside=self.outside + int(paths.outside.sum()),
            disagreements=self.disagreements + int(rows.disagrees.sum()),
            matched=self.matched + int(rows.matched.sum()),
            weights=self.weights + float(paths.weight[counted].sum()),
            squares=self.squares + float(paths.squares[counted].sum()),
        )

    def _with_model(self, rows: Rows, paths: Paths, counted: Bools) -> Tally:
        """Estimate what the model may speak about, and let it learn from all that is known, afterwards."""
        model, asked, choices = self.model, self.terms.model, rows.choices
        if model is None or asked is None:
            return self
        if choices is None:
            raise ValueError("a model needs choices: actions, distributions and features of each row")
        sequential, folds = self.terms.objective == "episode", model.fold_of(rows.names)
        row_folds, taught = folds[rows.units], counted[rows.units]
        ready = model.seen(folds) >= asked.warm
        predicted, debt = model.predict(choices, row_folds), asked.debt * self.terms.returns.span
        told = walk(rows, self.terms.returns, chained=sequential, predicted=predicted, debt=debt)
        good = ready & counted
        y = by_row(rows, paths.to_go) if sequential else rows.rewards
        return msgspec.structs.replace(
            self,
            doubly=self.doubly.add(told.value[good], told.size[good]),
            doubly_bounds=self.doubly_bounds.add(told.gain[ready], told.loss[ready], told.size[ready]),
            model=model.learn(choices.part(taught), y[taught], row_folds[taught], folds[counted]),
        )

    def _estimate(
        self, method: Method, figure: Figure | None, ends: tuple[float, float], units: int, support: Support
    ) -> Estimate:
        if support.effective_n < self.terms.least_effective:
            figure = None
        low, high = figure.interval(self.terms.level) if figure else (None, None)
        return Estimate(
            method=method,
            value=figure.value if figure else None,
            error=figure.error if figure else None,
            low=low,
            high=high,
            lower=ends[0],
            upper=ends[1],
            units=units,
            support=support,
        )

    def _support(self) -> Support:
        mean, left = self.plain.ratio(_MASS, _ROWS), self.plain.ratio(_LEFT, _ROWS)
        low, high = mean.interval(1.0 - self.terms.alpha) if mean else (None, None)
        return Support(
            units=self.units,
            rows=self.rows,
            left_out=self.left_out,
            outside=self.outside,
            effective_n=self.weights**2 / self.squares if self.squares else 0.0,
            mean_weight=mean.value if mean else None,
            mean_weight_low=low,
            mean_weight_high=high,
            unsupported=left.value if left else None,
            disagreements=self.disagreements,
            matched=self.matched,
        )

    def _advantage(self) -> OneStepAdvantage | None:
        figure = self.advantage.ratio(0, 1)
        if figure is None:
            return None
        low, high = figure.interval(self.terms.level)
        return OneStepAdvantage(value=figure.value, error=figure.error, low=low, high=high)


def _advantages(rows: Rows, paths: Paths) -> tuple[Floats, Floats]:
    """By episode whose return is known: Σ (w - 1)·G + u·least over its steps, and their number."""
    to_go, least = by_row(rows, paths.to_go), by_row(rows, paths.least)
    terms = (rows.targets / rows.propensities - 1.0) * to_go + rows.unsupported * least
    sums = np.asarray(np.bincount(rows.units, terms, len(rows.names)), np.float64)
    return sums[rows.known], rows.lengths[rows.known].astype(np.float64)
