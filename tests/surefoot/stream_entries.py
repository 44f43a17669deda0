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

# Two factors of three and two choices.
MULTI: dict[str, Any] = {
    "a": "2,0",
    "m": b"\1\0\1\1\1",
    "nm": b"\1\1\1\0\1",
    "record": {
        "action_kind": "multi_discrete",
        "nvec": (3, 2),
        "action_name": ["far", "off"],
        "proposed": [1, 0],
        "target": np.array([0.0, 1.0, 0.0, 1.0, 0.0]).tobytes(),
        "behaviour": np.array([0.01, 0.0, 0.99, 0.99, 0.01]).tobytes(),
        "propensity": 0.9802,
    },
}
# Two coordinates, the second open above and at the low end of its box.
POINT: dict[str, Any] = {
    "a": "0.5,-0.25",
    "m": np.array([-1.0, -0.25, 1.0, np.inf]).tobytes(),
    "nm": np.array([-np.inf, 0.0, 0.5, 1.0]).tobytes(),
    "record": {
        "action_kind": "continuous",
        "head": "gaussian",
        "action_name": None,
        "proposed": [0.5, -2.0],
        "target": np.array([0.25, -1.0, 0.5, 2.0]).tobytes(),
        "behaviour": b"",
        "propensity": None,
        "propensity_kind": "mixed",
        "log_propensity": -1.75,
        "sigma": np.array([0.1, 0.2]).tobytes(),
        "raw_action": np.array([0.5, -3.0]).tobytes(),
        "raw_log_prob": -2.5,
        "at_bound": (0, -1),
        "bounds": np.array([-1.0, -np.inf, 1.0, np.inf]).tobytes(),
    },
}


def changed(entry: dict[str, Any], /, **changes: Any) -> dict[str, Any]:
    """The same entry with other fields; those of `record` are changed one by one."""
    return {**entry, **changes, "record": {**entry["record"], **changes.get("record", {})}}


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
        "a": "0",
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


def n_step_fields(n: int, /, k: int = 3, **changes: Any) -> dict[str, Any]:
    """Entry number `n` of an episode over `k` steps: head of the first, end of the last."""
    head, last = fields(n, **changes), fields(n + k - 1)
    numbers = range(n, n + k)
    return {
        **{name: head[name] for name in ("v", "i", "p", "e", "q", "ep", "st", "t", "a", "s", "m", "d")},
        **{name: last[name] for name in ("x", "b", "n", "nm", "ni", "o")},
        "k": k,
        "ids": ",".join(fields(each)["i"] for each in numbers),
        "rs": ",".join(repr(float(each)) for each in numbers),
        "lps": ",".join(repr(-each / 8) for each in numbers),
        "js": ",".join("joined" for _ in numbers),
        **{name: value for name, value in changes.items() if name != "record"},
    }


def correction_fields(n: int, /, **changes: Any) -> dict[str, Any]:
    """The correction of entry number `n`."""
    return {
        **{name: fields(n)[name] for name in ("v", "i", "p", "e", "q", "r", "ri", "at", "rd")},
        "j": "joined",
        "w": "overtaken",
        **changes,
    }


def raw(entry: dict[str, Any]) -> dict[bytes, bytes]:
    """An entry as Redis gives it back."""
    return {name.encode(): value if isinstance(value, bytes) else str(value).encode() for name, value in entry.items()}


def key(policy: str, stream: str = "transitions") -> str:
    return f"sf:{{{policy}}}:{stream}"


def add(store: redis.Redis, policy: str, numbers: range | list[int], **changes: Any) -> list[bytes]:
    """Append entries with these numbers to the policy's stream."""
    pipe = store.pipeline(transaction=False)
    for n in numbers:
        pipe.xadd(key(policy), fields(n, **dict(changes)))  # type: ignore[arg-type]
    return list(pipe.execute())
