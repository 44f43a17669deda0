"""A trainer beside the faults: `surefoot.transitions` with a group of its own, from the first transition to the last.

Duty: write down what was delivered, how often, and each loss that the library raised. It reads past the faults' proxy
and survives the store's own deaths as the library does.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from types import TracebackType

from surefoot import Gap, Refused, Unreachable, transitions
from surefoot.batch import Batch
from surefoot.streams import Transitions

QUIET_S = 1.0


@dataclass(frozen=True, slots=True)
class Delivered:
    """One transition as a trainer sees it."""

    identity: tuple[str, int, int]
    id: str
    token: tuple[str, int]
    state: bytes
    action: int
    propensity: float
    reward: float
    join: str
    explored: bool
    version: str


class Trainer:
    """A context manager; `finish` reads what is left and ends it."""

    def __init__(self, policy: str, redis_url: str) -> None:
        self._policy, self._redis_url = policy, redis_url
        self.rows: list[Delivered] = []
        self.gaps: list[Gap] = []
        self.refused: list[str] = []
        self.copies = 0
        self.raised: BaseException | None = None
        self._last_call = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trainer")

    def __enter__(self) -> Trainer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._last_call.set()
        self._thread.join(120.0)

    def finish(self) -> None:
        """Read until nothing more comes. Raises what the reading raised."""
        self.__exit__(None, None, None)
        assert not self._thread.is_alive(), "the trainer does not come to an end"
        if self.raised is not None:
            raise self.raised

    def _run(self) -> None:
        try:
            with transitions(
                self._policy,
                "oracle",
                "one",
                redis_url=self._redis_url,
                block_s=0.2,
                max_wait_s=QUIET_S,
                batch_size=512,
            ) as stream:
                while self._read(stream) or not self._last_call.is_set():
                    self.copies = stream.statistics()["copies"]
        except BaseException as error:
            self.raised = error

    def _read(self, stream: Transitions) -> bool:
        """Take one thing from the stream; False when there was nothing for a while, or nobody answered."""
        try:
            self._keep(next(stream))
        except Gap as gap:
            self.gaps.append(gap)
        except (StopIteration, Unreachable):
            return False
        except Refused as error:  # a trainer in earnest would end here: rows report it
            self.refused.append(str(error))
            self._last_call.wait(0.05)
            return False
        return True

    def _keep(self, batch: Batch) -> None:
        for k in range(len(batch)):
            self.rows.append(
                Delivered(
                    (str(batch.producers[k]), int(batch.epochs[k]), int(batch.seqs[k])),
                    str(batch.ids[k]),
                    (str(batch.episodes[k]), int(batch.steps[k])),
                    batch.states[k].tobytes(),
                    int(batch.actions[k]),
                    float(batch.propensities[k]),
                    float(batch.rewards[k]),
                    str(batch.join_states[k]),
                    bool(batch.explored[k]),
                    str(batch.versions[k]),
                )
            )
