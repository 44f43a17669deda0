"""A Minari dataset of a policy's episodes. EDGE: files, SQLite, Minari.

Duty: rows to episodes in Minari's own storage. Which steps make an episode is said in `export_episodes.py`.
Strategy: transitions are born in the order in which their rewards and successors come, so all are put into a file of
SQLite first and read from there sorted: memory holds one stretch of one episode, whatever the stream's length. The
dataset grows beside its place and is renamed to it when it is complete.
Promise: observations are kept exactly (Minari's own default would turn images into lossy JPEG).
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium
import msgspec
import numpy as np
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage

from surefoot.entries import Row, Spec
from surefoot.export import ExportError, Report, claim, sync
from surefoot.export_episodes import Step, Stretch, stretches

_DATASET = re.compile(r"[-_\w]+-v\d+", re.ASCII)  # Minari's rule for the names of datasets
_FORMAT = "hdf5"

_TABLES = """
CREATE TABLE steps (spec INTEGER, episode TEXT, lane INTEGER, place INTEGER, at INTEGER, step BLOB);
CREATE TABLE episodes (episode TEXT PRIMARY KEY, at INTEGER) WITHOUT ROWID;
"""
# Episodes in the order they began.
_SORTED = """
SELECT step FROM steps JOIN episodes USING (episode) WHERE spec = ?
ORDER BY episodes.at, steps.episode, lane, place, steps.at
"""


class MinariDirectory:
    """The dataset of an export."""

    def __init__(self, path: Path, report: Report, *, append: bool) -> None:
        path = path.absolute()  # Minari does not find its files under a relative one
        self._path, self._report = path, report
        if append:
            raise ExportError("a Minari dataset cannot be added to: an open episode may go on. Export it anew")
        if path.exists():
            raise ExportError(f"{path} is there already: choose another directory")
        if not _DATASET.fullmatch(path.name):
            raise ExportError(f"{path.name!r} is no name of a Minari dataset: one such as cartpole-v0 is needed")
        self._unfinished = path.with_name(f".{path.name}.unfinished")
        self._unfinished.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self._unfinished, os.O_RDONLY)
        try:
            claim(self._handle, path)
        except ExportError:
            os.close(self._handle)
            raise
        for left in self._unfinished.iterdir():  # by an export that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        self._steps = sqlite3.connect(self._unfinished / "steps.sqlite3", isolation_level=None)
        self._steps.execute("PRAGMA journal_mode = OFF")  # what is lost here is read again
        self._steps.execute("PRAGMA synchronous = OFF")
        self._steps.executescript(_TABLES)
        self._specs: dict[Spec, int] = {}
        self._counts: Counter[Spec] = Counter()
        self._bounds: dict[Spec, np.ndarray[Any, Any]] = {}

    def start(self, from_: str | None) -> str | None:
        return from_

    def write(self, rows: Sequence[Row]) -> None:
        """Put rows aside, to be sorted."""
        encode = msgspec.msgpack.encode
        self._steps.execute("BEGIN")
        for row in rows:
            number = self._specs.setdefault(row.spec, len(self._specs))
            self._counts[row.spec] += 1
            self._widen(row)
            lane, place = (0, row.at_ms) if row.step < 0 else (1, row.step)
            values = (number, row.episode, lane, place, row.at_ms, encode(Step.of(row)))
            self._steps.execute("INSERT INTO steps VALUES (?, ?, ?, ?, ?, ?)", values)
            self._steps.execute(
                "INSERT INTO episodes VALUES (?1, ?2) ON CONFLICT DO UPDATE SET at = min(at, ?2)",
                (row.episode, row.at_ms),
            )
        self._steps.execute("COMMIT")

    def _widen(self, row: Row) -> None:
        """Versions may declare other bounds: the space of the dataset holds them all."""
        if not row.spec.space.continuous:
            return
        size = row.spec.space.coordinates
        anywhere = np.array([[-np.inf] * size, [np.inf] * size])
        bounds = np.frombuffer(row.record.bounds, "<f8").reshape(2, size) if row.record.bounds else anywhere
        known = self._bounds.setdefault(row.spec, bounds)
        self._bounds[row.spec] = np.stack([np.minimum(known[0], bounds[0]), np.maximum(known[1], bounds[1])])

    def finish(self) -> None:
        """Sort, write the dataset, and give it its name."""
        if not self._counts:
            raise ExportError("there is no transition to make a dataset of")
        spec = max(self._counts, key=lambda each: self._counts[each])
        self._report.left_out["other_spec"] += self._counts.total() - self._counts[spec]
        self._report.left_out += Counter()  # drops zeros
        data = self._unfinished / "data"
        data.mkdir()
        storage = MinariStorage.new(
            data,
            observation_space=_observations(spec),
            action_space=self._actions(spec),
            data_format=_FORMAT,
            jpeg_encoding=False,
        )
        storage.update_metadata(
            {
                "dataset_id": self._path.name,
                "minari_version": importlib.metadata.version("minari"),
                "description": f"Decisions of the policy {self._report.policy}, served by Surefoot.",
            }
        )
        storage.update_episodes(self._episodes(spec))
        storage.update_metadata({"surefoot": self._report.plain()})
        self._complete()

    def _actions(self, spec: Spec) -> gymnasium.Space[Any]:
        if spec.space.continuous:
            low, high = self._bounds[spec]
            return gymnasium.spaces.Box(low, high, dtype=np.float64)
        if spec.space.kind == "multi_discrete":
            return gymnasium.spaces.MultiDiscrete(spec.space.sizes)
        return gymnasium.spaces.Discrete(spec.space.sizes[0])

    def _episodes(self, spec: Spec) -> Iterator[EpisodeBuffer]:
        with closing(self._steps.execute(_SORTED, (self._specs[spec],))) as found:
            decode = msgspec.msgpack.Decoder(Step).decode
            for stretch in stretches((decode(blob) for (blob,) in found), self._report.left_out):
                self._report.episodes += 1
                self._report.written += len(stretch.steps)
                if stretch.cut:
                    self._report.cuts[stretch.cut] += 1
                yield _buffer(stretch, spec)

    def _complete(self) -> None:
        self._steps.close()
        (self._unfinished / "steps.sqlite3").unlink()
        data = self._unfinished / "data"
        for file in data.iterdir():
            sync(file)
        sync(data)
        os.rename(self._unfinished, self._path)
        sync(self._path.parent)
        self._report.files = 1

    def close(self) -> None:
        self._steps.close()
        shutil.rmtree(self._unfinished, ignore_errors=True)
        os.close(self._handle)


def _observations(spec: Spec) -> gymnasium.Space[Any]:
    """Entries hold no bounds of observations: floats are open, whole numbers have those of their type."""
    dtype = _dtype(spec)
    if dtype.kind == "f":
        return gymnasium.spaces.Box(-np.inf, np.inf, spec.shape, dtype.type)
    ends = (0, 1) if np.dtype(spec.dtype).kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    return gymnasium.spaces.Box(*ends, spec.shape, dtype.type)


def _dtype(spec: Spec) -> np.dtype[Any]:
    """The observation's own type; truth values become 0 and 1, for which a Box can stand."""
    dtype = np.dtype(spec.dtype).newbyteorder("=")
    return np.dtype(np.uint8) if dtype.kind == "b" else dtype


def _buffer(stretch: Stretch, spec: Spec) -> EpisodeBuffer:
    steps = stretch.steps
    raw = b"".join([*(step.state for step in steps), stretch.last])
    observations = np.frombuffer(raw, spec.dtype).reshape(len(steps) + 1, *spec.shape).astype(_dtype(spec))
    ended = np.arange(len(steps)) == len(steps) - 1
    return EpisodeBuffer(
        observations=observations,
        actions=np.array([step.action for step in steps], spec.space.action_dtype),
        rewards=np.array([step.reward for step in steps], np.float64),
        terminations=ended & stretch.terminated,
        truncations=ended & (not stretch.terminated),
        infos={
            "decision_id": [step.id for step in steps],
            "episode": [step.episode for step in steps],
            "step": np.array([step.step for step in steps], np.int64),
            "version": [step.version for step in steps],
            "propensity": np.array([step.propensity for step in steps], np.float64),  # None becomes NaN
            "log_propensity": np.array([step.log_propensity for step in steps], np.float64),
            "explored": np.array([step.explored for step in steps], np.bool_),
            "epsilon": np.array([step.epsilon for step in steps], np.float64),
        },
    )
