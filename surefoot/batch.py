"""A batch of transitions as numpy columns, ready for a training step.

Duty: turn rows of one observation and action spec into arrays with a leading axis B, and carry the means to acknowledge
them. Where the rows come from is known to `streams.py` alone.
Strategy: each bytes column is joined once and viewed as one array; nothing is converted element by element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from surefoot.entries import Row

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Strings = npt.NDArray[np.object_]  # of str: exact whatever the length, where numpy's own would cut trailing NULs


@dataclass(frozen=True, eq=False)
class Batch:
    """B transitions of one policy with the same observation shape and number of actions n.

    Strings are object arrays of `str`, "" where there is none.
    """

    policy: str
    ids: Strings  # [B] decision ids
    states: Array  # [B, *shape], dtype of the observation
    actions: Ints  # [B] executed actions
    rewards: Floats  # [B] NaN where the decision was voided
    next_states: Array  # [B, *shape] zeros where there is none: look at `bootstrap` first
    terminated: Bools  # [B] the environment ended the episode here
    truncated: Bools  # [B] a limit cut the episode here
    bootstrap: Bools  # [B] whether the value of `next_states` may be added
    ends: Strings  # [B] none | terminated | truncated | lost | single
    propensities: Floats  # [B] probability of the executed action; NaN where it is not known
    behaviour: Floats  # [B, n] what the action was drawn from
    target: Floats  # [B, n] the version's distribution before mask and exploration
    masks: Bools  # [B, n] allowed actions
    next_masks: Bools  # [B, n] allowed actions in the next state; all true where they are not known
    epsilons: Floats  # [B] exploration in force
    explored: Bools  # [B] the exploring part drew
    versions: Strings  # [B] the version that decided
    assigned_versions: Strings  # [B] the version that routing chose
    episodes: Strings  # [B]
    steps: Ints  # [B] -1 where the caller named none
    producers: Strings  # [B] (producer, epoch, seq) identifies an event
    epochs: Ints  # [B]
    seqs: Ints  # [B]
    join_states: Strings  # [B] joined | defaulted | void
    proposed: Ints  # [B] what the version would have done without a mask
    fallbacks: Strings  # [B] the reason, where the fallback answered
    overridden: Bools  # [B] a rule changed what the version would have done
    weights: Floats  # [B] routing weight of the assigned version at the pin
    switched: Bools  # [B] another version decided the step before
    reward_delays_ms: Floats  # [B] from decision to accepted reward; NaN where none came
    keys: Strings  # [B] routing keys
    at_ms: Ints  # [B] event time of the decision, milliseconds since 1970
    stream_ids: tuple[bytes, ...] = field(repr=False)
    _acknowledge: Callable[[Batch], None] = field(repr=False)

    def __len__(self) -> int:
        return len(self.actions)

    def ack(self) -> None:
        """Tell Redis that these transitions are done with, so that no consumer of the group gets them again.

        Call it after what you made of them is safe (after the training step, or after a checkpoint). Calling it again
        does no harm.
        """
        self._acknowledge(self)

    @classmethod
    def of(
        cls, policy: str, rows: Sequence[Row], acknowledge: Callable[[Batch], None], also: Sequence[bytes] = ()
    ) -> Batch:
        """Stack rows of one spec. `also`: entries that are acknowledged with them, being copies."""
        dtype, shape, n = rows[0].spec
        states = _stack([row.state for row in rows], dtype, shape)
        blank, unknown = bytes(len(rows[0].state)), b"\1" * n
        return cls(
            policy=policy,
            states=states,
            next_states=_stack([row.next_state or blank for row in rows], dtype, shape),
            behaviour=_stack([row.record.behaviour for row in rows], "<f8", (n,)),
            target=_stack([row.record.target for row in rows], "<f8", (n,)),
            masks=_stack([row.mask for row in rows], "u1", (n,)) != 0,
            # All true and not all false: a maximum over an empty mask is -inf, and -inf times `bootstrap` is NaN.
            next_masks=_stack([row.next_mask or unknown for row in rows], "u1", (n,)) != 0,
            stream_ids=(*(row.stream_id for row in rows), *also),
            _acknowledge=acknowledge,
            **_event_columns(rows),
            **_record_columns(rows),
        )


def _event_columns(rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "ids": _strings([row.id for row in rows]),
        "actions": np.array([row.action for row in rows], np.int64),
        "rewards": np.array([row.reward for row in rows], np.float64),
        "terminated": np.array([row.terminated for row in rows], np.bool_),
        "truncated": np.array([row.truncated for row in rows], np.bool_),
        "bootstrap": np.array([row.bootstrap for row in rows], np.bool_),
        "ends": _strings([row.end for row in rows]),
        "episodes": _strings([row.episode for row in rows]),
        "steps": np.array([row.step for row in rows], np.int64),
        "producers": _strings([row.identity[0] for row in rows]),
        "epochs": np.array([row.identity[1] for row in rows], np.int64),
        "seqs": np.array([row.identity[2] for row in rows], np.int64),
        "join_states": _strings([row.join for row in rows]),
        "reward_delays_ms": np.array([row.reward_delay_ms for row in rows], np.float64),
        "at_ms": np.array([row.at_ms for row in rows], np.int64),
    }


def _record_columns(rows: Sequence[Row]) -> dict[str, Any]:
    records = [row.record for row in rows]
    known = [math.nan if record.propensity is None else record.propensity for record in records]
    return {
        "propensities": np.array(known, np.float64),
        "epsilons": np.array([record.epsilon for record in records], np.float64),
        "explored": np.array([record.explored for record in records], np.bool_),
        "versions": _strings([record.version for record in records]),
        "assigned_versions": _strings([record.assigned_version for record in records]),
        "proposed": np.array([record.proposed for record in records], np.int64),
        "fallbacks": _strings([record.fallback or "" for record in records]),
        "overridden": np.array([record.overridden for record in records], np.bool_),
        "weights": np.array([record.weight for record in records], np.float64),
        "switched": np.array([record.switched for record in records], np.bool_),
        "keys": _strings([record.key or "" for record in records]),
    }


def _stack(column: Sequence[bytes], dtype: str, shape: tuple[int, ...]) -> Array:
    # A bytearray, so that the array is writable: torch warns about arrays that are not.
    return np.frombuffer(bytearray(b"".join(column)), dtype).reshape(len(column), *shape)


def _strings(values: Sequence[str]) -> Strings:
    column = np.empty(len(values), np.object_)
    column[:] = values
    return column
