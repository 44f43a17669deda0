"""EDGE: one shadow's network asked about decisions that others made, and its answers compared with them.

Duty: from rows to comparisons; whether its breaker lets it be asked; its own memory of episodes. It knows no thread, no
queue and nothing of where scores go.
Strategy: what fails is an answer, too: the shadow would have fallen back, and is compared as such. A call that raises
is made again in halves, so that one odd state does not speak for the batch that it came in; one that takes too long is
ended by the engine's watchdog and not made again.
Promise: raises nothing of the network's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from policies.engine import Engine, Overdue
from policies.heads import target
from policies.network import Memory, Outputs
from policies.types import Bools, Box, Floats
from safety.breaker import Breaker, Faults
from shadow.compare import Compared, compare_choices, finite, uniforms_of
from shadow.memory import Episodes, waves
from shadow.shown import ChoiceRows, Rows
from shadow.totals import Totals

if TYPE_CHECKING:
    from shadow.shown import PointRows

# (decision ids, how many) -> float64 [B, how many]: the uniforms that the decisions were drawn with.
Uniforms = Callable[[Sequence[str], int], Floats]


@dataclass(frozen=True, slots=True)
class Scored:
    """Rows that were scored, how, and why each row's network has no usable answer ("" where it has one)."""

    rows: Rows
    compared: Compared
    faults: list[str]
    row_s: float  # a row's part of the calls


class Scorer:
    """Scores for one shadow. Use from one thread."""

    def __init__(
        self,
        engine: Engine,
        uniforms: Uniforms,
        totals: Totals,
        limit_s: float,
        monotonic_s: Callable[[], float],
        called: Callable[[float], None],
    ) -> None:
        """called: told the duration of each call of the network."""
        self._engine, self._bundle = engine, engine.bundle
        self._uniforms = uniforms
        self._totals = totals
        self._limit_s = limit_s
        self._monotonic_s = monotonic_s
        self._called = called
        self._breaker = Breaker()
        self._episodes = Episodes() if self._bundle.interface.recurrent else None

    @property
    def tripped(self) -> bool:
        """Whether its breaker is open: until it is re-armed nothing is asked."""
        return self._breaker.faults is Faults.OPEN

    def rearm(self) -> None:
        """Close the breaker, and count anew."""
        self._breaker.rearm()

    def fault(self) -> None:
        """Count a fault of the comparison itself as one of the shadow."""
        self._breaker.observe(self._monotonic_s(), fault=True, slow=False)

    @property
    def most_rows(self) -> int:
        """Rows of one call that takes some 20 ms."""
        return self._engine.rows_within(0.020)

    def score(self, rows: Rows) -> Scored | None:
        """Score rows; those that a recurrent shadow cannot place are left out. None: nothing is left."""
        began_s = self._monotonic_s()
        if self._episodes is None:
            outputs, faults = self._ask(rows)
        else:
            placed, outputs, faults = self._steps(rows, self._episodes)
            self._totals.dropped["memory"] += len(rows) - len(placed)
            if not placed:
                return None
            rows = rows if len(placed) == len(rows) else rows.some(placed)
        row_s = (self._monotonic_s() - began_s) / len(rows)
        compared = self._compare(rows, outputs)
        wrong = zip(faults, compared.faulty.tolist(), strict=True)
        return Scored(rows, compared, [why or ("not_finite" if faulty else "") for why, faulty in wrong], row_s)

    def _compare(self, rows: Rows, outputs: Outputs) -> Compared:
        bundle, logged = self._bundle, rows.logged
        if isinstance(bundle.action, Box):
            from policies.continuous import Transform, gaussian  # loads scipy: only where it is needed
            from shadow.compare_points import compare_points

            points = cast("PointRows", logged)
            transform = Transform.of(bundle.head, bundle.transform, bundle.action)
            u = self._uniforms(rows.ids, 1 + bundle.action.size)
            return compare_points(gaussian(outputs, bundle.head), transform, points, u, bundle.fallback)
        choices = cast(ChoiceRows, logged)
        wanted = target(outputs, bundle.head, bundle.temperature, bundle.action.nvec)
        values = outputs.astype(np.float64) if bundle.head == "q_values" else None
        u = self._uniforms(rows.ids, uniforms_of(choices))
        return finite(compare_choices(wanted, choices, u, bundle.fallback, values))

    def _ask(self, rows: Rows) -> tuple[Outputs, list[str]]:
        """Outputs [B, width], NaN where there are none, and why."""
        try:
            outputs, _ = self._call(rows, None)
            return outputs, [""] * len(rows)
        except Overdue:
            return self._nothing(len(rows)), ["inference_timeout"] * len(rows)
        except RuntimeError:
            if len(rows) == 1 or self.tripped:
                return self._nothing(len(rows)), ["inference_failed"] * len(rows)
        half = len(rows) // 2
        parts = [self._ask(rows.some(part)) for part in (range(half), range(half, len(rows)))]
        return np.concatenate([each for each, _ in parts]), [why for _, found in parts for why in found]

    def _steps(self, rows: Rows, episodes: Episodes) -> tuple[list[int], Outputs, list[str]]:
        """Take the rows' steps, episode by episode. Gives which rows could be placed, their outputs, and faults."""
        outputs, faults = self._nothing(len(rows)), [""] * len(rows)
        placed: list[int] = []
        for wave in waves(rows.episodes):
            first = self._engine.first_memory(1)[0]
            found = [(i, episodes.before(rows.episodes[i], rows.steps[i], first)) for i in wave]
            known = [(i, before) for i, before in found if before is not None]
            if not known:
                continue
            at = [i for i, _ in known]
            placed += at
            self._wave(rows.some(at), np.stack([before for _, before in known]), at, outputs, faults, episodes)
        placed.sort()
        return placed, outputs[placed], [faults[i] for i in placed]

    def _wave(
        self, rows: Rows, before: Memory, at: list[int], outputs: Outputs, faults: list[str], episodes: Episodes
    ) -> None:
        """Take one step of several episodes. Where it fails, they are forgotten: what comes after is not known."""
        try:
            outputs[at], after = self._call(rows, before)
        except RuntimeError as error:
            for i, episode in zip(at, rows.episodes, strict=True):
                faults[i] = "inference_timeout" if isinstance(error, Overdue) else "inference_failed"
                episodes.forget(cast(str, episode))
            return
        for row, (episode, step) in enumerate(zip(rows.episodes, rows.steps, strict=True)):
            episodes.keep(cast(str, episode), cast(int, step), before[row], after[row])

    def _call(self, rows: Rows, memory: Memory | None) -> tuple[Outputs, Memory]:
        began_s, fault = self._monotonic_s(), True
        asked = rows.asked if self._bundle.interface.mask is not None else None
        try:
            outputs, after = self._engine.step(rows.states, asked, memory, self._limit_s)
            fault = self._faulty(rows, outputs)
            return outputs, after
        finally:
            took_s = self._monotonic_s() - began_s
            self._totals.call(took_s, len(rows), fault=fault)
            self._called(took_s)
            self._breaker.observe(self._monotonic_s(), fault=fault, slow=False)

    def _faulty(self, rows: Rows, outputs: Outputs) -> bool:
        """Whether the network gave something that is no answer, for a state of the kind that it was trained on."""
        if np.isfinite(outputs).all():
            return False
        known: Bools = self._bundle.observation.within(rows.states)
        return bool((~np.isfinite(outputs).all(axis=1) & known).any())

    def _nothing(self, count: int) -> Outputs:
        return np.full((count, self._bundle.width), np.nan)
