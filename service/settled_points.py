"""What is recorded and answered of a settled group besides what every decision has: points, distributions. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from policies.bundle import PolicyBundle
from policies.explore import Behaviour
from policies.types import Box, columns
from service.plan import Settled
from service.wire import PointDistribution

if TYPE_CHECKING:
    from policies.continuous import DrawnPoints, PointBehaviour


class Points:
    """What is recorded of a drawn point besides what every decision has."""

    def __init__(self, drawn: DrawnPoints, behaviour: PointBehaviour, bundle: PolicyBundle) -> None:
        space = cast(Box, bundle.action)
        self._kinds = drawn.kinds
        self._log_propensity = drawn.log_propensity.tolist()
        self._raw = slices(drawn.raw)
        self._raw_log_prob = drawn.raw_log_prob.tolist()
        self._at_bound = drawn.at_bound.tolist()
        self._bounds = np.concatenate(space.bounds).tobytes()
        self._sigma = b"" if behaviour.sigma is None else behaviour.sigma.tobytes()
        self._transform = "tanh" if bundle.head == "squashed_gaussian" else bundle.transform

    def of(self, i: int, passed: bool) -> dict[str, Any]:
        return {
            "propensity_kind": self._kinds[i],
            "log_propensity": known(self._log_propensity[i]) if passed else None,
            "transform": self._transform,
            "bounds": self._bounds,
            "sigma": self._sigma,
            "raw_action": self._raw[i],
            "raw_log_prob": known(self._raw_log_prob[i]),
            "at_bound": tuple(self._at_bound[i]),
        }


def known(number: float) -> float | None:
    """A number that JSON can carry, or None."""
    return number if math.isfinite(number) else None


def distribution(settled: Settled, i: int) -> list[float | list[float]] | PointDistribution:
    """What row i was drawn from, as answers hold it."""
    behaviour = settled.behaviour
    if isinstance(behaviour, Behaviour):
        row = behaviour.probabilities[i].tolist()
        return row if len(behaviour.nvec) == 1 else [row[part] for part in columns(behaviour.nvec)]
    return PointDistribution(
        mean=behaviour.target.mean[i].tolist(),
        std=behaviour.target.std[i].tolist(),
        low=[known(end) for end in behaviour.low[i].tolist()],
        high=[known(end) for end in behaviour.high[i].tolist()],
        epsilon=float(behaviour.epsilon[i]),
        sigma=None if behaviour.sigma is None else behaviour.sigma.tolist(),
    )


def slices(array: npt.NDArray[np.generic]) -> list[bytes]:
    """Each row of an array [B, …] as little-endian bytes, made by one copy of the whole."""
    whole = array.tobytes()
    stride = len(whole) // len(array)
    return [whole[i * stride : (i + 1) * stride] for i in range(len(array))]
