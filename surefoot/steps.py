"""The steps of an n-step transition, and how numbers stand in the fields of an entry. Pure.

Duty: read the lists that such an entry has in place of one reward, one log-propensity and one join state.
Promise: nothing is rounded; lists of different lengths, or a number that is not finite, raise ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Steps:
    """What each of the k steps brought. Invariant: all have length k, which is at least 1."""

    ids: tuple[str, ...]
    rewards: tuple[float, ...]  # NaN where there is none
    log_propensities: tuple[float, ...]  # NaN where it is not known
    joins: tuple[str, ...]

    @classmethod
    def read(cls, fields: Mapping[bytes, bytes]) -> Steps:
        k = whole(fields[b"k"])
        ids, rewards, logs, joins = (fields[name].decode().split(",") for name in (b"ids", b"rs", b"lps", b"js"))
        if k < 1 or {len(each) for each in (ids, rewards, logs, joins)} != {k}:
            raise ValueError(f"{k} steps, and lists of other lengths")
        if ids[0] != fields[b"i"].decode():
            raise ValueError("the first of the steps is another decision")
        return cls(tuple(ids), tuple(map(number, rewards)), tuple(map(log, logs)), tuple(joins))

    def __len__(self) -> int:
        return len(self.ids)

    def plain(self) -> dict[str, Any]:
        """Give them as values; NaN where there is nothing."""
        return {
            "n_steps": len(self),
            "step_ids": list(self.ids),
            "step_rewards": list(self.rewards),
            "step_log_propensities": list(self.log_propensities),
            "step_joins": list(self.joins),
        }


def whole(raw: bytes) -> int:
    """Read what fits an int64, as columns hold it."""
    found = int(raw)
    if not -(2**63) <= found < 2**63:
        raise ValueError(f"{found} is out of range")
    return found


def number(text: str) -> float:
    """Read a finite number; NaN for an empty text."""
    found = float(text or "nan")
    if text and not math.isfinite(found):
        raise ValueError(f"{text} is not finite")
    return found


def log(text: str) -> float:
    """Read the log of a probability or density, which may be -inf; NaN for an empty text."""
    found = float(text or "nan")
    if text and not found < math.inf:
        raise ValueError(f"{text} is no logarithm")
    return found
