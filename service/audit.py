"""The audit log as values: what an entry says, how entries are chained, how a chain is verified. Pure.

    hash(n) = SHA-256(canonical bytes of entry n without its hash; they hold prev_hash = hash(n - 1))

Duty: canonical bytes, hashes, verification. Where entries are kept is `audit_files.py`'s and `audit_chain.py`'s.
Strategy: canonical bytes are JSON with sorted keys and no blanks; values are text, whole numbers and null, so that
there is one way to write each. A field that is added later is covered by the hash without a change here: the object is
hashed as it stands, not as this program reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import Struct

GENESIS: Final = "0" * 64
MAX_TEXT: Final = 200  # names from a path may be of any length

_encoder: Final = msgspec.json.Encoder(order="sorted")


class Statement(Struct, frozen=True, kw_only=True):
    """What was done, or refused, by whom. It is written before it has a place in the chain.

    segment, number: which statement this is, wherever it is read. before, after: the policy's generation. digest:
    SHA-256 of what was put in force. outcome: `done`, the code of a refusal, or `unknown` where the process ended in
    between.
    """

    segment: str
    number: int
    at_ms: int
    actor: str
    owner: str
    address: str
    action: str
    policy: str = ""
    subject: str = ""
    before: int | None = None
    after: int | None = None
    digest: str = ""
    outcome: str = "unknown"


class Entry(Statement, frozen=True, kw_only=True):
    """A statement with its place in the chain."""

    seq: int
    prev_hash: str
    hash: str


class Head(NamedTuple):
    """The last entry of a chain: its number, from 1, and its hash."""

    seq: int = 0
    hash: str = GENESIS


class Broken(Exception):
    """A chain is not what was written. `seq` is the first entry that is wrong."""

    def __init__(self, seq: int, reason: str) -> None:
        super().__init__(f"entry {seq}: {reason}")
        self.seq = seq
        self.reason = reason


def canonical(fields: Mapping[str, Any]) -> bytes:
    """Write an entry's fields as its hash covers them."""
    return _encoder.encode({name: value for name, value in fields.items() if name != "hash"})


def line_of(value: Any) -> bytes:
    """Write a statement or an entry as it is kept: one line, without its end."""
    return _encoder.encode(value)


def chain(statement: Statement, head: Head) -> Entry:
    """Give a statement the place after the head."""
    fields = msgspec.structs.asdict(statement) | {"seq": head.seq + 1, "prev_hash": head.hash}
    return Entry(**fields, hash=sha256(canonical(fields)).hexdigest())


def check(line: bytes, head: Head) -> Head:
    """Check the entry that should follow the head, and give the new head. Raises Broken."""
    seq = head.seq + 1
    try:
        fields = msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise Broken(seq, f"it is no JSON object ({error})") from None
    if fields.get("seq") != seq:
        raise Broken(seq, f"entry {fields.get('seq')} stands in its place")
    if fields.get("prev_hash") != head.hash:
        raise Broken(seq, "it does not follow the entry before it")
    if sha256(canonical(fields)).hexdigest() != fields.get("hash"):
        raise Broken(seq, "its content is not what its hash says")
    return Head(seq, fields["hash"])


def heads(lines: Iterable[bytes]) -> Iterator[Head]:
    """Verify entries one after the other and give the head after each. Raises Broken at the first that is wrong."""
    head = Head()
    for line in lines:
        head = check(line, head)
        yield head


def verify(lines: Iterable[bytes], contains: Head | None = None) -> Head:
    """Verify a whole chain and give its head. contains: an entry that was noted down before. Raises Broken."""
    head = Head()
    for head in heads(lines):
        if contains is not None and head.seq == contains.seq and head.hash != contains.hash:
            raise Broken(head.seq, f"it is not the one that was noted down ({contains.hash[:16]}…)")
    if contains is not None and head.seq < contains.seq:
        raise Broken(head.seq + 1, f"the chain ends before entry {contains.seq}, which was noted down")
    return head


def clipped(text: str) -> str:
    """Shorten what a caller wrote, for the log."""
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
