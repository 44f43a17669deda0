"""Mutations of real bundles, as hypothesis strategies: of bytes, of protobufs by field, of YAML and JSON by value."""

from __future__ import annotations

import json
from typing import Any

import onnx
import yaml
from google.protobuf.message import DecodeError, EncodeError
from hypothesis import strategies as st

from policies.archive import read_folder_files
from policies.store import BUNDLED
from tests.fuzz.fuzz_gate import refitted
from tests.policies.gate import hostile, odd
from tests.policies.networks import bundle_files, identity_files, index_of_largest

Files = dict[str, bytes]

SEEDS: list[Files] = [
    identity_files(),
    read_folder_files(BUNDLED / "cartpole" / "v2", hardlinks=True),
    odd.good(exploration={"epsilon": 0.5}, temperature=2.0),
    odd.masked(-1e9),
    odd.deviating(-1.0),
    odd.recurrent(0.5),
    odd.looping_above(50.0),
    bundle_files(index_of_largest(), [[0.0, 1.0]], [[0.0, 1.0]], head="action"),
    bundle_files(hostile.identity(hostile.in_a_function), [[0.0, 1.0]], [[0.0, 1.0]]),
]
INTEGERS = [0, 1, -1, 2, 3, 127, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 63) - 1, -(1 << 63)]
ODD: list[Any] = [
    *INTEGERS, 1 << 64, 10**400, 0.0, -0.0, 1e308, -1e308, 1e-320, float("nan"), float("inf"), -float("inf"),
    None, True, False, "", "none", "a0", "\0", "é" * 300, [], {}, [[]], [None], {"": None}, [float("nan")],
]  # fmt: skip
TOKENS = [
    b"&a [*a]", b"&a {x: *a}", b"!!python/object/apply:os.system [ls]", b"!!binary aGk=", b"2020-01-01", b"0x7fffffff",
    b"1:30:00", b"<<: {a: 1}", b"? [a]\n: b", b".nan", b"-.inf", b"1e999", b"---\n", b"\t", b"\xff", b"%YAML 9.9\n",
    b"[" * 2000, b"{a: " * 2000, b"9" * 5000, b"'\\0'", b"\xef\xbb\xbf", b"\xfe\xff",
]  # fmt: skip


@st.composite
def mutated_bytes(draw: st.DrawFn, content: bytes, donors: list[bytes]) -> bytes:
    """Content with one to four changes: a bit, a cut, a slice gone, twice or elsewhere, a piece of another file."""
    for _ in range(draw(st.integers(1, 4))):
        at, end = sorted(draw(st.tuples(st.integers(0, len(content)), st.integers(0, len(content)))))
        donor = draw(st.sampled_from([*donors, *TOKENS, draw(st.binary(max_size=32))]))
        begin, stop = sorted(draw(st.tuples(st.integers(0, len(donor)), st.integers(0, len(donor)))))
        content = draw(st.sampled_from(_changed(content, at, end, donor[begin:stop])))
    return content


def _changed(content: bytes, at: int, end: int, piece: bytes) -> list[bytes]:
    flipped = bytes(byte ^ 1 << end % 8 for byte in content[at : at + 1])
    return [
        content[:at] + flipped + content[at + 1 :],
        content[:at],
        content[:at] + content[end:],
        content[:end] + content[at:],
        content[:at] + piece + content[at:],
        content[:at] + piece + content[end:],
    ]


@st.composite
def mutated_tree(draw: st.DrawFn, tree: Any) -> Any:
    """A document with one value, somewhere in it, that is odd, gone, or twice as much."""
    if isinstance(tree, dict) and tree and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(list(tree)))
        if not draw(st.integers(0, 6)):
            return {name: value for name, value in tree.items() if name != key}
        return tree | {key: draw(mutated_tree(tree[key]))}
    if isinstance(tree, list) and tree and draw(st.integers(0, 4)):
        at = draw(st.integers(0, len(tree) - 1))
        if not draw(st.integers(0, 6)):
            return draw(st.sampled_from([tree[:at], tree * 2, [tree]]))
        return [*tree[:at], draw(mutated_tree(tree[at])), *tree[at + 1 :]]
    return draw(st.sampled_from(ODD))


@st.composite
def mutated_proto(draw: st.DrawFn, model: bytes) -> bytes:
    """A network with one to three fields set to something else, wherever in it they are."""
    proto = onnx.ModelProto.FromString(model)
    for _ in range(draw(st.integers(1, 3))):
        message: Any = proto
        for _ in range(draw(st.integers(0, 8))):
            children = [
                each
                for field, value in message.ListFields()
                if field.message_type is not None
                for each in (value if _repeated(field) else [value])
            ]
            if not children:
                break
            message = draw(st.sampled_from(children))
        _set_one(draw, message)
    try:
        return bytes(proto.SerializeToString())
    except (EncodeError, DecodeError):
        return model


def _repeated(field: Any) -> bool:
    return bool(field.is_repeated)


def _set_one(draw: st.DrawFn, message: Any) -> None:
    field = draw(st.sampled_from(list(message.DESCRIPTOR.fields)))
    if field.message_type is not None:
        change = draw(st.sampled_from(["clear", "add"]))
        if change == "clear":
            message.ClearField(field.name)
        elif _repeated(field):
            getattr(message, field.name).add()
        else:
            getattr(message, field.name).SetInParent()
        return
    kinds: dict[int, st.SearchStrategy[Any]] = {
        field.CPPTYPE_STRING: st.sampled_from(["", "observation", "q_values", "If", "EPContext", "com.microsoft", "é"]),
        field.CPPTYPE_FLOAT: st.sampled_from([0.0, 1e38, float("nan")]),
        field.CPPTYPE_DOUBLE: st.sampled_from([0.0, 1e300, float("nan")]),
        field.CPPTYPE_ENUM: st.integers(0, 30),
    }
    value = draw(kinds.get(field.cpp_type, st.sampled_from(INTEGERS)))
    try:
        value = value.encode() if field.type == field.TYPE_BYTES else value
        if _repeated(field):
            getattr(message, field.name).append(value)
        else:
            setattr(message, field.name, value)
    except ValueError:  # out of the field's range
        message.ClearField(field.name)


@st.composite
def mutated_bundles(draw: st.DrawFn) -> Files:
    """The files of a real bundle, one or two of them changed; the manifest names the network's digest."""
    files = dict(draw(st.sampled_from(SEEDS)))
    donor = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(files)))
        try:
            files[name] = draw(_mutated(name, files[name], list(donor.values())))
        except (yaml.YAMLError, ValueError, DecodeError, RecursionError):  # changed before, past reading
            files[name] = draw(mutated_bytes(files[name], list(donor.values())))
    return refitted(files)


def _mutated(name: str, content: bytes, donors: list[bytes]) -> st.SearchStrategy[bytes]:
    by_bytes = mutated_bytes(content, donors)
    if name == "model.onnx":
        return st.one_of(by_bytes, mutated_proto(content))
    if name == "policy.yaml":
        return st.one_of(by_bytes, mutated_tree(yaml.safe_load(content)).map(lambda t: yaml.safe_dump(t).encode()))
    return st.one_of(by_bytes, mutated_tree(json.loads(content)).map(lambda t: json.dumps(t).encode()))
