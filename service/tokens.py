"""Tokens: what is kept of each, how one is made, how a given one is recognised. Pure.

Duty: values and questions. Where tokens are kept is `token_store.py`'s, what a role may do is `roles.py`'s.
Strategy: a token is 32 random bytes, and only its SHA-256 is kept. A slow hash (bcrypt, Argon2) makes guessing dear
where there are few guesses to make, as with passwords; of 2^256 there are enough, and a hash of 100 ms would be spent
on each `/act`. A given token is looked up by its hash: what the time of that lookup tells is about hashes, which
nobody can choose, and the last comparison takes the same time wherever it fails.
Promise: the text of a token is in no document, log or message but the one answer that hands it out.
"""

from __future__ import annotations

import hmac
import re
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Annotated, Final

from msgspec import Meta, Struct

from service.roles import Role

PREFIX: Final = "sf_"  # so that scanners of repositories and logs find one that has leaked
BYTES: Final = 32
# 22 characters of base64 are 128 bits. What is shorter was chosen by a person, and may be guessed.
STRONG: Final = 22
ID: Final = re.compile(r"t-[0-9a-f]{12}")
MAX_TOKENS: Final = 1_000  # the document stays below half a megabyte

NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,62}$"
Name = Annotated[str, Meta(pattern=NAME)]


class Token(Struct, frozen=True):
    """What is kept of a token. policies: those that it is for; empty: all. Times in ms since the epoch."""

    id: str
    hash: str
    role: Role
    owner: str
    created_at_ms: int
    created_by: str
    policies: tuple[str, ...] = ()
    expires_at_ms: int | None = None
    note: str = ""

    def valid(self, now_ms: int) -> bool:
        """Say whether it may be used at this time."""
        return self.expires_at_ms is None or now_ms < self.expires_at_ms


class Tokens(Struct, frozen=True):
    """All tokens, as one document. Invariant: generation grows by one with each change."""

    generation: int = 0
    tokens: dict[str, Token] = {}

    def plus(self, token: Token) -> Tokens:
        """Give the next document, with a token more."""
        return Tokens(self.generation + 1, self.tokens | {token.id: token})

    def minus(self, token_id: str) -> Tokens:
        """Give the next document, without a token."""
        return Tokens(self.generation + 1, {name: each for name, each in self.tokens.items() if name != token_id})


def text_of(random: bytes) -> str:
    """Write a token as text. random: bytes [32]."""
    return PREFIX + urlsafe_b64encode(random).rstrip(b"=").decode()


def hash_of(text: bytes) -> str:
    """Give what is kept of a token's text."""
    return sha256(text).hexdigest()


def by_hash(tokens: Iterable[Token]) -> dict[str, Token]:
    """Index tokens for `recognise`."""
    return {token.hash: token for token in tokens}


def recognise(table: Mapping[str, Token], text: bytes, now_ms: int) -> Token | None:
    """Find the token that a text is, if it is valid at this time."""
    digest = hash_of(text)
    found = table.get(digest)
    if found is None or not hmac.compare_digest(found.hash, digest) or not found.valid(now_ms):
        return None
    return found
