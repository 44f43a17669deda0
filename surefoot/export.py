"""Transitions as files that other tools read: Parquet, Minari, and the dsjson of Vowpal Wabbit.

Duty: what is asked for, checked before anything is written, and the report of what came of it. Each format has a file
of its own, imported only when it is asked for: their libraries are optional (`pip install surefoot[exports]`).
Promise: **each transition exactly once** in what an export leaves behind, also when it is killed and started again.
What cannot be said in a format is left out by rule, never bent, and counted by its reason.
"""

from __future__ import annotations

import fcntl
import importlib
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from surefoot.entries import Row
from surefoot.rows import ExportError, GroupReader, RangeReader, Reader, Stretch
from surefoot.streams import DEFAULT_REDIS_URL

__all__ = ["ExportError", "Format", "Report", "export_transitions"]

Format = Literal["parquet", "minari", "dsjson"]

EXTRA = "exports"


@dataclass(slots=True)
class Report:
    """What came of an export."""

    policy: str
    format: str
    out: str
    read: int = 0  # transitions read
    written: int = 0  # of these, written now
    already_there: int = 0  # of these, found in the files of an export before
    copies: int = 0  # entries that the service had sent twice; not among those read
    left_out: Counter[str] = field(default_factory=Counter)  # transitions by the reason why they are in no file
    cuts: Counter[str] = field(default_factory=Counter)  # Minari: episodes cut into segments, by reason
    episodes: int = 0  # Minari: segments written
    files: int = 0  # files made or added to
    first_id: str | None = None  # stream ids of the first and the last entry read
    last_id: str | None = None
    gaps: list[str] = field(default_factory=list)  # transitions that were gone before they could be read

    def saw(self, rows: Sequence[Row]) -> None:
        """Count rows that were read."""
        if rows:
            self.read += len(rows)
            self.first_id = self.first_id or rows[0].stream_id.decode()
            self.last_id = rows[-1].stream_id.decode()

    def plain(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        whole = {name: getattr(self, name) for name in self.__slots__}
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in whole.items()}


class Sink(Protocol):
    """Where rows go: one of these for each format."""

    def start(self, from_: str | None) -> str | None:
        """Where reading begins, given where it was asked to begin: later, if what comes before is there already."""

    def write(self, rows: Sequence[Row]) -> None:
        """Take rows. When this returns they need not be kept any more."""

    def finish(self) -> None:
        """Everything was read: complete what is written."""

    def close(self) -> None:
        """Give back what is held, whether or not it came to `finish`."""


def export_transitions(
    policy: str,
    to: Format,
    out: str | Path,
    *,
    redis_url: str = DEFAULT_REDIS_URL,
    from_: str | None = None,
    until: str | None = None,
    group: str | None = None,
    consumer: str | None = None,
    batch_size: int = 5_000,
    append: bool = False,
    wait_s: float = 0.0,
    claim_idle_s: float = 60.0,
) -> Report:
    """Write a policy's transitions to files.

    to: parquet, a directory; minari, a directory whose name is the dataset's (`cartpole-v0`); dsjson, a file.
    from_, until: inclusive stream ids, or ISO 8601 times at which transitions were *joined*; without, all that is
    there. group, consumer (Parquet only): read as a consumer of a group and acknowledge what is safely on disk;
    `from_` is then where the group begins if it is made, and what is in `out` already is kept. batch_size: most rows
    in memory, and in a Parquet file. append: add to what is in `out`. wait_s: how long to wait for more, or for a
    Redis that is away. claim_idle_s: what another consumer has not acknowledged for so long is taken over.

    Raises ExportError for what cannot be done, ImportError naming the extra where a library is missing, Unreachable,
    Refused and Unreadable as `transitions` does. Running it again, with `append` or the same group, completes it.
    """
    if to not in get_args(Format):
        raise ExportError(f"the formats are {', '.join(get_args(Format))}, not {to!r}")
    if batch_size < 1 or wait_s < 0 or claim_idle_s <= 0:
        raise ExportError("batch_size and claim_idle_s must be positive, wait_s not negative")
    _check_group(to, group, consumer, until)
    report = Report(policy, to, str(out))
    path = Path(out)
    sink = _sink(to, path, report, append=append or group is not None)
    try:
        reader: Reader
        if group is not None and consumer is not None:
            options: dict[str, Any] = {"wait_s": wait_s, "claim_idle_s": claim_idle_s, "batch_size": batch_size}
            reader = GroupReader(policy, redis_url, group, consumer, start=from_, **options)
        else:
            stretch = Stretch(sink.start(from_), until)
            reader = RangeReader(policy, redis_url, stretch, batch_size, retry_for_s=wait_s)
        _copy(reader, sink, report)
        sink.finish()
    finally:
        sink.close()
    return report


def _copy(reader: Reader, sink: Sink, report: Report) -> None:
    with closing(reader.chunks()) as chunks:
        for chunk in chunks:
            report.saw(chunk.rows)
            sink.write(chunk.rows)
            reader.ack(chunk)
    report.copies, report.gaps = reader.losses.copies, reader.losses.gaps


def _check_group(to: str, group: str | None, consumer: str | None, until: str | None) -> None:
    if group is None and consumer is None:
        return
    if group is None or consumer is None:
        raise ExportError("a group needs the name of its consumer, and a consumer its group")
    if to != "parquet":
        raise ExportError(f"a group can be exported to parquet only; without one, {to} is made of a stretch")
    if until is not None:
        raise ExportError("a group is read to its end: leave out until")


def _sink(to: str, path: Path, report: Report, *, append: bool) -> Sink:
    """The writer of a format. Its module imports libraries that may be missing."""
    if to == "dsjson":
        from surefoot.export_dsjson import DsjsonFile

        return DsjsonFile(path, report, append=append)
    need(("pyarrow",) if to == "parquet" else ("minari", "h5py", "PIL"))
    if to == "parquet":
        from surefoot.export_parquet import ParquetDirectory

        return ParquetDirectory(path, report, append=append)
    from surefoot.export_minari import MinariDirectory

    return MinariDirectory(path, report, append=append)


def need(modules: Sequence[str]) -> None:
    """Raise ImportError, naming the extra, unless these can be imported."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"{name} is needed and missing: pip install 'surefoot[{EXTRA}]'", name=name) from error


def claim(handle: int, path: Path) -> None:
    """Have an open file or folder for this export alone. Raises ExportError where another has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ExportError(f"another export is writing {path}") from None


def sync(folder: Path) -> None:
    """Have the names in a folder survive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
