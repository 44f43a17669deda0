"""A file of decisions as Vowpal Wabbit's `--dsjson` reads them: one JSON object a line, choices only.

Duty: a row to a line, and lines to a file. It knows nothing of Redis.
Strategy: the actions of a line are those that the mask allowed, the chosen one first in `a` and `p`, as the service
that the format comes from wrote them; their ids and `_label_Action` count within the line. What has no usable reward or
no propensity is left out: `_skipLearn` would have the reader skip it as well, and `pdrop` is for what was dropped at
random, which these are not.
Promise: a new file appears whole, under its name only when it is complete; one that is added to holds whole lines of a
prefix of the stream whenever it is killed, and the next run continues behind them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from surefoot.entries import Row
from surefoot.export import ExportError, Report, claim, sync
from surefoot.rows import has_reward
from surefoot.survey import following

_TAIL_BYTES = 1 << 20  # looked at for the last whole line; doubled until there is one

_BEGIN = b'{"_label_cost":'

_encode = msgspec.json.Encoder().encode


class DsjsonFile:
    """The file of an export."""

    def __init__(self, path: Path, report: Report, *, append: bool) -> None:
        self._path, self._report = path, report
        if path.is_dir():
            raise ExportError(f"{path} is a directory: dsjson is written to a file")
        if path.exists() and not append:
            raise ExportError(f"{path} is there already: add to it with append, or choose another file")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._adds = append
        self._unfinished = path if append else path.with_name(f".{path.name}.unfinished")
        self._file: BinaryIO = self._unfinished.open("a+b")  # not "w": it may be another export's that is under way
        try:
            claim(self._file.fileno(), path)
            if not append:
                self._file.truncate(0)
            self._last = _cut_to_whole_lines(self._file)
        except ExportError:
            self._file.close()
            raise

    def start(self, from_: str | None) -> str | None:
        """Read behind the last line that is there."""
        if self._last is None:
            return from_
        return following(self._last.encode()).decode()

    def write(self, rows: Sequence[Row]) -> None:
        lines = []
        for row in rows:
            if reason := why_not(row):
                self._report.left_out[reason] += 1
            else:
                lines.append(_encode(decision(row)))
        if lines:
            self._file.write(b"\n".join(lines) + b"\n")
            self._report.written += len(lines)

    def finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        if not self._adds:
            os.rename(self._unfinished, self._path)
            sync(self._path.parent)
        self._report.files = 1

    def close(self) -> None:
        self._file.close()
        if not self._adds:
            self._unfinished.unlink(missing_ok=True)


def why_not(row: Row) -> str | None:
    """Why a row cannot be learnt from here, or None. Raises ExportError for actions that are no single choice."""
    space, mass = row.spec.space, row.record.propensity
    if space.kind != "discrete":
        raise ExportError(
            f"dsjson is for one choice of several: the actions of {row.stream_id.decode()} are {space.kind}; "
            "export to parquet or minari instead"
        )
    if not has_reward(row):
        return row.join
    if row.record.fallback is not None:
        return "fallback"  # nobody's choice: whatever is learnt, the fallback would have answered
    if mass is None or not 0.0 < mass <= 1.0:
        return row.record.propensity_reason or "no propensity"
    if not row.mask[int(row.action)]:  # type: ignore[arg-type]
        return "action not allowed"
    return None


def decision(row: Row) -> dict[str, Any]:
    """Give a row as the format's object. `StreamId` and what follows are ours: Vowpal Wabbit passes over them."""
    chosen = int(row.action)  # type: ignore[arg-type]
    allowed = [index for index, bit in enumerate(row.mask) if bit]
    behaviour = np.frombuffer(row.record.behaviour, "<f8")
    place = allowed.index(chosen)
    order = [place, *(each for each in range(len(allowed)) if each != place)]
    return {
        "_label_cost": 0.0 - row.reward,  # not -reward: a cost of -0.0 reads oddly
        "_label_probability": row.record.propensity,
        "_label_Action": place + 1,
        "_labelIndex": place,
        "o": [{"v": row.reward, "EventId": row.id, "ActionTaken": True}],
        "Timestamp": _timestamp(row.at_ms),
        "Version": "1",
        "EventId": row.id,
        "a": [each + 1 for each in order],
        "c": {**_shared(row), "_multi": [{"A": {"action": str(index)}} for index in allowed]},
        "p": [float(behaviour[allowed[each]]) for each in order],
        "VWState": {"m": row.record.version},
        "StreamId": row.stream_id.decode(),
        "Episode": row.episode or None,
        "Step": None if row.step < 0 else row.step,
        "Join": row.join,
        "Explored": row.record.explored,
    }


def _shared(row: Row) -> dict[str, Any]:
    """The observation as namespace S, by index; what the caller told of the context as namespace C."""
    state = np.frombuffer(row.state, row.spec.dtype)
    shared: dict[str, Any] = {"S": (state.astype(np.uint8) if state.dtype.kind == "b" else state).tolist()}
    if context := _flat(row.record.context or {}):
        shared["C"] = context
    return shared


def _flat(context: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested values under dotted names. Names that begin with an underscore would be instructions to the reader."""
    flat: dict[str, Any] = {}
    for name, value in context.items():
        whole = f"{path}{name}".replace("_", "·", 1) if not path and str(name).startswith("_") else f"{path}{name}"
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{whole}."))
        elif isinstance(value, list | tuple):
            flat.update(_flat({str(index): each for index, each in enumerate(value)}, f"{whole}."))
        elif isinstance(value, str | bool) or (isinstance(value, int | float) and math.isfinite(value)):
            flat[whole] = value
    return flat


def _timestamp(at_ms: int) -> str:
    at = datetime.fromtimestamp(at_ms // 1000, UTC)
    return f"{at:%Y-%m-%dT%H:%M:%S}.{at_ms % 1000:03d}Z"


def _cut_to_whole_lines(file: BinaryIO) -> str | None:
    """Cut off what a kill left of a line, and give the stream id of the last whole one.

    Raises ExportError, and changes nothing, where the file was not written here.
    """
    size = file.seek(0, os.SEEK_END)
    begin, tail = _tail(file, size)
    end = tail.rfind(b"\n") + 1
    rest = tail[end:]
    if rest[: len(_BEGIN)] != _BEGIN[: len(rest)]:
        raise ExportError(f"{file.name} ends in what is none of our lines")
    last = _stream_id(tail[tail.rfind(b"\n", 0, end - 1) + 1 : end], file.name) if end else None
    file.truncate(begin + end)
    file.seek(0, os.SEEK_END)
    return last


def _tail(file: BinaryIO, size: int) -> tuple[int, bytes]:
    """The end of a file, from some place before its last whole line on."""
    looked_at = _TAIL_BYTES
    while True:
        begin = max(0, size - looked_at)
        file.seek(begin)
        tail = file.read(size - begin)
        if begin == 0 or tail.count(b"\n") > 1:
            return begin, tail
        looked_at *= 2


def _stream_id(line: bytes, name: str) -> str:
    try:
        return str(msgspec.json.decode(line)["StreamId"])
    except (msgspec.MsgspecError, KeyError, TypeError) as error:
        raise ExportError(f"the last line of {name} is none of ours: {error!r}") from error
