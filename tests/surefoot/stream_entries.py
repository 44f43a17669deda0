"""Entries of a transitions stream, made with the service's own codec and field names."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import redis

from service.decision import Record, RewardRecord, encode_record

RECORD = Record(
    policy="p",
    assigned_version="v2",
    version="v2",
    digest="d" * 64,
    role="champion",
    generation=1,
    dtype="<f4",
    shape=(4,),
    head="q_values",
    outputs_dtype="<f4",
    outputs=np.array([0.5, 0.25], "<f4").tobytes(),
    target=np.array([1.0, 0.0]).tobytes(),
    behaviour=np.array([0.99, 0.01]).tobytes(),
    epsilon=0.02,
    explored=False,
    proposed=0,
    action_name="left",
    propensity=0.99,
    key_id=1,
    key="user-1",
)


def state(n: int, size: int = 4) -> bytes:
    return (np.arange(size, dtype="<f4") + n).tobytes()


def fields(n: int, /, **changes: Any) -> dict[str, Any]:
    """Entry number `n` of an episode: decision n, its reward n, and the state that followed."""
    record = changes.pop("record", {})
    return {
        "v": 1,
        "i": f"{n:060x}",
        "p": "w0",
        "e": 1,
        "q": 2 * n,
        "ep": "episode",
        "st": n,
        "t": 1_000 + n,
        "a": 0,
        "s": state(n),
        "m": b"\1\1",
        "d": encode_record(msgspec.structs.replace(RECORD, **record)),
        "r": repr(float(n)),
        "j": "joined",
        "x": "none",
        "b": 1,
        "n": state(n + 1),
        "nm": b"\1\0",
        "ni": f"{n + 1:060x}",
        "o": "step",
        "at": 1_050 + n,
        "ri": "",
        "rd": encode_record(RewardRecord()),
        "tf": 0,
        **changes,
    }


def key(policy: str) -> str:
    return f"sf:{{{policy}}}:transitions"


def add(store: redis.Redis, policy: str, numbers: range | list[int], **changes: Any) -> list[bytes]:
    """Append entries with these numbers to the policy's stream."""
    pipe = store.pipeline(transaction=False)
    for n in numbers:
        pipe.xadd(key(policy), fields(n, **dict(changes)))  # type: ignore[arg-type]
    return list(pipe.execute())
