"""The Parquet schema of transitions: every column with its Arrow type, and how rows become a table.

Duty: names, types and values of columns; it knows no file. docs/exports.md has the same table, and a test holds the two
against each other.
Strategy: the columns are the same for all policies, so that files of several can be read as one; what a kind of action
does not have is null. The elements of a state alone have the observation's own type, so that nothing is rounded.
Promise: what an entry holds stands here exactly. NaN is never written for "not known": that is null.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from surefoot.entries import Row, Spec
from surefoot.rows import has_reward
from surefoot.spaces import Kind

SCHEMA_VERSION = "1"

_TIME = pa.timestamp("ms", tz="UTC")
_DOUBLES, _BOOLS, _INTS = pa.list_(pa.float64()), pa.list_(pa.bool_()), pa.list_(pa.int64())
_METRICS = pa.map_(pa.string(), pa.float64())


class Column(NamedTuple):
    """A column. `of` gives a row's value; None, or b"" of packed numbers, is null."""

    name: str
    type: pa.DataType
    of: Callable[[Row], Any]
    packed: str = ""  # the numpy dtype of the bytes that `of` gives; "": it gives Python values
    kinds: tuple[Kind, ...] = ()  # of action that have it; (): all. `of` is asked of no other


_CHOICES: tuple[Kind, ...] = ("discrete", "multi_discrete")
_POINTS: tuple[Kind, ...] = ("continuous",)


def _box(prefix: str, of: Callable[[Row], bytes]) -> list[Column]:
    """The two ends of a box, whose bytes hold all low ends and then all high ends."""
    return [
        Column(f"{prefix}_low", _DOUBLES, lambda row: of(row)[: len(of(row)) // 2], "<f8", _POINTS),
        Column(f"{prefix}_high", _DOUBLES, lambda row: of(row)[len(of(row)) // 2 :], "<f8", _POINTS),
    ]


def _by_kind(prefix: str, of: Callable[[Row], Any]) -> list[Column]:
    """An action in the column of its kind."""
    return [
        Column(prefix, pa.int64(), of, "", ("discrete",)),
        Column(f"{prefix}_factors", _INTS, lambda row: list(of(row)), "", ("multi_discrete",)),
        Column(f"{prefix}_point", _DOUBLES, lambda row: list(of(row)), "", _POINTS),
    ]


def _known(number: float | None) -> float | None:
    return None if number is None or math.isnan(number) else number


def _text(value: Any) -> str | None:
    """JSON of anything but text; None where there is nothing."""
    return value if value is None or isinstance(value, str) else msgspec.json.encode(value).decode()


# Order is that of the files. States stand apart: their type depends on the observation.
_HEAD = [
    Column("id", pa.string(), lambda row: row.id),
    Column("episode", pa.string(), lambda row: row.episode or None),
    Column("step", pa.int64(), lambda row: None if row.step < 0 else row.step),
    Column("at", _TIME, lambda row: row.at_ms),
    Column("key", pa.string(), lambda row: row.record.key),
]
_TAIL = [
    Column("action_kind", pa.string(), lambda row: row.spec.space.kind),
    *_by_kind("action", lambda row: row.action),
    Column("action_name", pa.string(), lambda row: _text(row.record.action_name)),
    Column("reward", pa.float64(), lambda row: row.reward if has_reward(row) else None),
    Column("join", pa.string(), lambda row: row.join),
    Column("reward_at", _TIME, lambda row: row.reward_at_ms),
    Column("reward_delay_ms", pa.float64(), lambda row: _known(row.reward_delay_ms)),
    Column("reward_id", pa.string(), lambda row: row.reward_id or None),
    Column("metrics", _METRICS, lambda row: None if row.metrics is None else list(row.metrics.items())),
    Column("end", pa.string(), lambda row: row.end),
    Column("terminated", pa.bool_(), lambda row: row.terminated),
    Column("truncated", pa.bool_(), lambda row: row.truncated),
    Column("bootstrap", pa.bool_(), lambda row: row.bootstrap),
    Column("order", pa.string(), lambda row: row.order or None),
    Column("next_id", pa.string(), lambda row: row.next_id or None),
    Column("propensity", pa.float64(), lambda row: row.record.propensity),
    Column("log_propensity", pa.float64(), lambda row: _known(row.log_propensity)),
    Column("propensity_kind", pa.string(), lambda row: row.record.propensity_kind),
    Column("propensity_reason", pa.string(), lambda row: row.record.propensity_reason),
    Column("behaviour", _DOUBLES, lambda row: row.record.behaviour, "<f8", _CHOICES),
    Column("target", _DOUBLES, lambda row: row.record.target, "<f8"),
    Column("nvec", _INTS, lambda row: list(row.spec.space.sizes), "", _CHOICES),
    Column("mask", _BOOLS, lambda row: row.mask, "?", _CHOICES),
    Column("next_mask", _BOOLS, lambda row: row.next_mask, "?", _CHOICES),
    *_box("box", lambda row: row.mask),
    *_box("next_box", lambda row: row.next_mask),
    *_box("bounds", lambda row: row.record.bounds),
    Column("raw_action", _DOUBLES, lambda row: row.record.raw_action, "<f8", _POINTS),
    Column("raw_log_prob", pa.float64(), lambda row: row.record.raw_log_prob, "", _POINTS),
    Column("sigma", _DOUBLES, lambda row: row.record.sigma, "<f8", _POINTS),
    Column("at_bound", _INTS, lambda row: list(row.record.at_bound), "", _POINTS),
    Column("transform", pa.string(), lambda row: row.record.transform, "", _POINTS),
    Column("epsilon", pa.float64(), lambda row: row.record.epsilon),
    Column("explored", pa.bool_(), lambda row: row.record.explored),
    *_by_kind("proposed", lambda row: row.record.proposed),
    Column("overridden", pa.bool_(), lambda row: row.record.overridden),
    Column("rules", pa.list_(pa.string()), lambda row: list(row.record.rules)),
    Column("fallback", pa.string(), lambda row: row.record.fallback),
    Column("assigned_version", pa.string(), lambda row: row.record.assigned_version),
    Column("role", pa.string(), lambda row: row.record.role or None),
    Column("weight", pa.float64(), lambda row: row.record.weight),
    Column("switched", pa.bool_(), lambda row: row.record.switched),
    Column("state_reset", pa.bool_(), lambda row: row.record.state_reset),
    Column("context", pa.string(), lambda row: _text(row.record.context)),
    Column("producer", pa.string(), lambda row: row.identity[0]),
    Column("epoch", pa.int64(), lambda row: row.identity[1]),
    Column("seq", pa.int64(), lambda row: row.identity[2]),
    Column("stream_id", pa.string(), lambda row: row.stream_id.decode()),
]


def schema(spec: Spec, metadata: dict[str, str]) -> pa.Schema:
    """Give the schema of rows of one spec. `metadata` is kept with the file."""
    described = {"shape": ",".join(map(str, spec.shape)), "dtype": np.dtype(spec.dtype).name}
    states = [pa.field(name, _state_type(spec), metadata=described) for name in ("state", "next_state")]
    plain = [[pa.field(column.name, column.type) for column in part] for part in (_HEAD, _TAIL)]
    return pa.schema([*plain[0], *states, *plain[1]], {"surefoot.schema": SCHEMA_VERSION, **metadata})


def table(rows: Sequence[Row], metadata: dict[str, str]) -> pa.Table:
    """Make a table of rows of one spec."""
    spec = rows[0].spec
    arrays = [_array(column, rows) for column in _HEAD]
    arrays += [_states(spec, [row.state for row in rows]), _states(spec, [row.next_state for row in rows])]
    arrays += [_array(column, rows) for column in _TAIL]
    return pa.Table.from_arrays(arrays, schema=schema(spec, metadata))


def _array(column: Column, rows: Sequence[Row]) -> pa.Array:
    if column.kinds and rows[0].spec.space.kind not in column.kinds:
        return pa.nulls(len(rows), column.type)
    values = [column.of(row) for row in rows]
    return _lists(values, column.packed, column.type) if column.packed else pa.array(values, column.type)


def _is_image(spec: Spec) -> bool:
    return np.dtype(spec.dtype) == np.uint8 and len(spec.shape) > 1


def _state_type(spec: Spec) -> pa.DataType:
    return pa.binary() if _is_image(spec) else pa.list_(pa.from_numpy_dtype(np.dtype(spec.dtype).newbyteorder("=")))


def _states(spec: Spec, raw: Sequence[bytes]) -> pa.Array:
    if _is_image(spec):
        return pa.array([each or None for each in raw], pa.binary())
    return _lists(raw, spec.dtype, _state_type(spec))


def _lists(raw: Sequence[bytes], dtype: str, type_: pa.ListType) -> pa.Array:
    """Lists of numbers from their bytes; b"" is null."""
    numbers = np.frombuffer(b"".join(raw), dtype)
    values = pa.array(numbers.astype(numbers.dtype.newbyteorder("="), copy=False), type_.value_type)
    offsets = np.concatenate([[0], np.cumsum([len(each) // numbers.itemsize for each in raw])]).astype(np.int32)
    missing = np.array([not each for each in raw])
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=type_, mask=pa.array(missing))
