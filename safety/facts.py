"""What rules read, and what they say, for B rows of one version. Frozen values. Pure leaf beside `types.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from policies.types import Bools, Floats


@dataclass(frozen=True, slots=True)
class Facts:
    """B rows as rules see them, all read before the draw.

    states: [B, *shape], as the network got them. contexts: the requests' `context`. keys: the requests' `key`.
    previous: each key's last executed action, indices or numbers; None: not known to have one. past: whether the key's
    past could be read; where it could not, rules on it deny. scores: the network's target scores [B, N] (q values or
    probabilities), None for continuous actions. greedy: scores are values, not probabilities. faulty: bool [B], rows
    without a usable answer.
    """

    states: npt.NDArray[np.floating]
    contexts: Sequence[Mapping[str, object] | None]
    keys: Sequence[str | None]
    previous: Sequence[tuple[float, ...] | None]
    past: Bools
    scores: Floats | None
    greedy: bool
    faulty: Bools


@dataclass(frozen=True, slots=True)
class Masked:
    """A rule over choices: allowed, bool [B, N], factors side by side."""

    name: str
    allowed: Bools


@dataclass(frozen=True, slots=True)
class MaskedJointly:
    """A rule over the product of factors: allowed, bool [B, prod(nvec)], the last factor fastest."""

    name: str
    allowed: Bools


@dataclass(frozen=True, slots=True)
class Boxed:
    """A rule over points: low and high, float64 [B, D]; low above high where nothing is left."""

    name: str
    low: Floats
    high: Floats


@dataclass(frozen=True, slots=True)
class Replaced:
    """A rule that takes rows away from the version: rows bool [B], True where the rule's `then` answers instead."""

    name: str
    rows: Bools


Verdict = Masked | MaskedJointly | Boxed | Replaced
