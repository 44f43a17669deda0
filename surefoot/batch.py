"""A batch of transitions as numpy columns, ready for a training step.

Duty: turn rows of one observation and action spec into arrays with a leading axis B, and carry the means to acknowledge
them. Where the rows come from is known to `streams.py` alone.
Strategy: each bytes column is joined once and viewed as one array; nothing is converted element by element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from surefoot.entries import Row
from surefoot.spaces import FLOAT, Kind, Space

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Strings = npt.NDArray[np.object_]  # of str: exact whatever the length, where numpy's own would cut trailing NULs


@dataclass(frozen=True, eq=False)
class Batch:
    """B transitions of one policy with the same observation shape and action space.

    An action is an index (discrete), F indices (multi_discrete, `nvec` has the sizes of the factors), or D numbers
    (continuous). N is the number of choices, sum(nvec), factors side by side; 0 for continuous actions. D is 0 for all
    others. Strings are object arrays of `str`, "" where there is none.

    In a batch of n-step transitions (`transitions(..., n_step=True)`) everything is about the first step, but
    `next_states`, `next_masks`, `next_boxes`, `bootstrap`, `ends`, `terminated` and `truncated`, which are about the
    last, and `rewards`, `log_propensities`, `step_ids` and `step_joins`, which have a column for each step.
    """

    policy: str
    action_kind: Kind
    nvec: tuple[int, ...]  # (n,), the sizes of the factors, or () over a box
    ids: Strings  # [B] decision ids
    states: Array  # [B, *shape], dtype of the observation
    actions: Array  # int64 [B] or [B, F], float64 [B, D]: executed actions
    rewards: Floats  # [B] NaN where there is none: see `join_states`; of n steps [B, n_max], NaN-padded
    next_states: Array  # [B, *shape] zeros where there is none: look at `bootstrap` first
    terminated: Bools  # [B] the environment ended the episode here
    truncated: Bools  # [B] a limit cut the episode here
    bootstrap: Bools  # [B] whether the value of `next_states` may be added
    ends: Strings  # [B] none | terminated | truncated | lost | single
    propensities: Floats  # [B] probability of the executed action; NaN where it is not known, or is a density
    log_propensities: Floats  # [B] its log, or that of a density: see `propensity_kinds`; NaN where it is not known; of
    # n steps [B, n_max], NaN-padded
    propensity_kinds: Strings  # [B] mass | density | mixed
    behaviour: Floats  # [B, N] what each factor's choice was drawn from
    target: Floats  # [B, N] the version's distribution before mask and exploration; [B, 2·D] raw means, then deviations
    masks: Bools  # [B, N] allowed choices
    next_masks: Bools  # [B, N] allowed choices in the next state; all true where they are not known
    boxes: Floats  # [B, 2, D] allowed points: low ends, high ends; infinite where open
    next_boxes: Floats  # [B, 2, D] the next state's; the action space's own where it is not known
    bounds: Floats  # [B, 2, D] the action space's own ends
    transforms: Strings  # [B] from raw actions to executed ones, before projection onto the box: none | unscale | tanh
    raw_actions: Floats  # [B, D] the draw before transform and projection; if `explored`, before projection
    raw_log_probs: Floats  # [B] log-density of that draw under the part that drew it; NaN where there is none
    sigmas: Floats  # [B, D] deviation of the exploring part; zeros where there was none
    at_bound: Ints  # [B, D] -1 where the action lies at the low end of its box, 1 at the high end, 0 between
    epsilons: Floats  # [B] exploration in force
    explored: Bools  # [B] the exploring part drew
    versions: Strings  # [B] the version that decided
    assigned_versions: Strings  # [B] the version that routing chose
    episodes: Strings  # [B]
    steps: Ints  # [B] -1 where the caller named none
    producers: Strings  # [B] (producer, epoch, seq) identifies an event
    epochs: Ints  # [B]
    seqs: Ints  # [B]
    join_states: Strings  # [B] joined | defaulted | void | quarantined
    n_steps: Ints  # [B] how many steps lie between `states` and `next_states`: 1, unless n-step transitions are read
    step_ids: Strings  # [B, n_max] decision ids of the steps, padded with ""
    step_joins: Strings  # [B, n_max] join states of the steps, padded with ""
    proposed: Array  # like `actions`: what the version would have done without rules
    fallbacks: Strings  # [B] the reason, where the fallback answered
    overridden: Bools  # [B] a rule changed what the version would have done
    weights: Floats  # [B] routing weight of the assigned version at the pin
    switched: Bools  # [B] another version decided the step before
    state_resets: Bools  # [B] a recurrent version had lost its memory of the episode and started anew
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

    def returns(self, gamma: float) -> Floats:
        """Give the discounted sum of the rewards of each transition, Σ γ^i r_i over its steps, float64 [B].

        NaN where a reward is missing. The target of temporal-difference learning is
        `returns(gamma) + discounts(gamma) * value(next_states)`, of one step as of n.
        """
        rewards = self.rewards.reshape(len(self), -1)
        taken = np.arange(rewards.shape[1]) < self.n_steps[:, None]
        total: Floats = np.where(taken, rewards * np.power(gamma, np.arange(rewards.shape[1])), 0.0).sum(axis=1)
        return total

    def discounts(self, gamma: float) -> Floats:
        """Give what the value of `next_states` counts, γ^k, float64 [B]; 0 where it must not be added."""
        factors: Floats = np.where(self.bootstrap, np.power(float(gamma), self.n_steps), 0.0)
        return factors

    def tensors(self, device: Any = None) -> dict[str, Any]:
        """Give every column of numbers as a torch tensor, by its name here. Columns of strings stay with the batch.

        Dtypes are those of the columns: states as the observation has them, other numbers float64 or int64, masks and
        flags bool. On the CPU (`device` None) memory is shared with the columns; else it is copied to the device.
        Raises ImportError, which says what to install, without torch; TypeError for a dtype that torch has not.
        """
        from surefoot.tensors import as_tensors

        columns = ((each.name, getattr(self, each.name)) for each in fields(self))
        return as_tensors({name: column for name, column in columns if isinstance(column, np.ndarray)}, device)

    @classmethod
    def of(
        cls, policy: str, rows: Sequence[Row], acknowledge: Callable[[Batch], None], also: Sequence[bytes] = ()
    ) -> Batch:
        """Stack rows of one spec. `also`: entries that are acknowledged with them, being copies."""
        dtype, shape, space = rows[0].spec
        blank = bytes(len(rows[0].state))
        return cls(
            policy=policy,
            action_kind=space.kind,
            nvec=() if space.continuous else space.sizes,
            states=_stack([row.state for row in rows], dtype, shape),
            next_states=_stack([row.next_state or blank for row in rows], dtype, shape),
            stream_ids=(*(row.stream_id for row in rows), *also),
            _acknowledge=acknowledge,
            **_event_columns(rows),
            **_record_columns(rows),
            **_action_columns(rows, space),
            **_step_columns(rows),
        )


def _action_columns(rows: Sequence[Row], space: Space) -> dict[str, Any]:
    """Everything whose shape depends on the action space. Over choices D is 0, over a box N is."""
    records, n, d = [row.record for row in rows], space.width, space.coordinates
    dtype, shape = space.action_dtype, space.action_shape
    anywhere = np.array([[-math.inf] * d, [math.inf] * d]).tobytes()
    bounds = [record.bounds or anywhere for record in records]
    masks, next_masks, boxes, next_boxes = [[b""] * len(rows)] * 4
    if space.continuous:
        boxes, next_boxes = _allowed(rows, bounds)
    else:
        # All true and not all false: a maximum over an empty mask is -inf, and -inf times `bootstrap` is NaN.
        masks, next_masks = _allowed(rows, [b"\1" * n] * len(rows))
    return {
        "actions": np.array([row.action for row in rows], dtype).reshape(len(rows), *shape),
        "proposed": np.array([record.proposed for record in records], dtype).reshape(len(rows), *shape),
        "propensity_kinds": _strings([record.propensity_kind for record in records]),
        "behaviour": _stack([record.behaviour for record in records], "<f8", (n,)),
        "target": _stack([record.target for record in records], "<f8", (space.target_width,)),
        "masks": _stack(masks, "u1", (n,)) != 0,
        "next_masks": _stack(next_masks, "u1", (n,)) != 0,
        "boxes": _stack(boxes, "<f8", (2, d)),
        "next_boxes": _stack(next_boxes, "<f8", (2, d)),
        "bounds": _stack(bounds, "<f8", (2, d)),
        "transforms": _strings([record.transform for record in records]),
        "raw_actions": _stack([record.raw_action for record in records], "<f8", (d,)),
        "raw_log_probs": _numbers([record.raw_log_prob for record in records]),
        "sigmas": _stack([record.sigma or bytes(FLOAT * d) for record in records], "<f8", (d,)),
        "at_bound": np.array([record.at_bound for record in records], np.int64).reshape(len(rows), d),
    }


def _allowed(rows: Sequence[Row], unknown: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
    """What was allowed, and what is in the next state, where that is not known `unknown`."""
    return [row.mask for row in rows], [row.next_mask or other for row, other in zip(rows, unknown, strict=True)]


def _event_columns(rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "ids": _strings([row.id for row in rows]),
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
    return {
        "propensities": _numbers([record.propensity for record in records]),
        "epsilons": np.array([record.epsilon for record in records], np.float64),
        "explored": np.array([record.explored for record in records], np.bool_),
        "versions": _strings([record.version for record in records]),
        "assigned_versions": _strings([record.assigned_version for record in records]),
        "fallbacks": _strings([record.fallback or "" for record in records]),
        "overridden": np.array([record.overridden for record in records], np.bool_),
        "weights": np.array([record.weight for record in records], np.float64),
        "switched": np.array([record.switched for record in records], np.bool_),
        "state_resets": np.array([record.state_reset for record in records], np.bool_),
        "keys": _strings([record.key or "" for record in records]),
    }


def _step_columns(rows: Sequence[Row]) -> dict[str, Any]:
    """What has one column, or one for each step."""
    several = [row.steps for row in rows if row.steps is not None]
    if not several:
        return {
            "rewards": np.array([row.reward for row in rows], np.float64),
            "log_propensities": np.array([row.log_propensity for row in rows], np.float64),
            "n_steps": np.ones(len(rows), np.int64),
            "step_ids": _strings([row.id for row in rows])[:, None],
            "step_joins": _strings([row.join for row in rows])[:, None],
        }
    return {
        "rewards": _padded([steps.rewards for steps in several], math.nan),
        "log_propensities": _padded([steps.log_propensities for steps in several], math.nan),
        "n_steps": np.array([len(steps) for steps in several], np.int64),
        "step_ids": _padded([steps.ids for steps in several], ""),
        "step_joins": _padded([steps.joins for steps in several], ""),
    }


def _padded(columns: Sequence[Sequence[Any]], blank: Any) -> Array:
    """Rows of different lengths side by side, [B, n_max]: float64, or strings as objects."""
    width = max(map(len, columns))
    dtype = np.object_ if isinstance(blank, str) else np.float64
    return np.array([[*row, *[blank] * (width - len(row))] for row in columns], dtype).reshape(len(columns), width)


def _stack(column: Sequence[bytes], dtype: str, shape: tuple[int, ...]) -> Array:
    # A bytearray, so that the array is writable: torch warns about arrays that are not.
    return np.frombuffer(bytearray(b"".join(column)), dtype).reshape(len(column), *shape)


def _numbers(values: Sequence[float | None]) -> Floats:
    return np.array([math.nan if value is None else value for value in values], np.float64)


def _strings(values: Sequence[str]) -> Strings:
    column = np.empty(len(values), np.object_)
    column[:] = values
    return column
