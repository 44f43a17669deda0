"""Decision ids: time-ordered, self-describing, unforgeable. Pure.

60 hexadecimal digits: 48 bits of time, 32 bits of the policy's digest, 8 bits of partition, 80 random bits, 8 bits of
key id, 64 bits of a keyed tag over all of it. Any replica that holds the keys refuses an id that was never issued, and
knows from the id alone to which policy it belongs.
Keys: `kid:hex,kid:hex`; the first signs, all verify. Tag key and draw key are derived from each, so neither tells the
other.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from policies.errors import ConfigError, UnknownDecision

KEY_BYTES = 32
RANDOM_BYTES = 10
_BODY_BYTES = 6 + 4 + 1 + RANDOM_BYTES + 1
_TAG_BYTES = 8
ID_LENGTH = 2 * (_BODY_BYTES + _TAG_BYTES)


@dataclass(frozen=True, slots=True)
class Key:
    """One signing key and what is derived from it."""

    kid: int
    tag: bytes
    draw: bytes

    @classmethod
    def derive(cls, kid: int, secret: bytes) -> Key:
        def child(person: bytes) -> bytes:
            return blake2b(secret, digest_size=KEY_BYTES, person=person).digest()

        return cls(kid, child(b"surefoot-tag"), child(b"surefoot-drawkey"))


@dataclass(frozen=True, slots=True)
class DecisionId:
    """What an id says. `text` is the id itself."""

    text: str
    at_ms: int
    policy: bytes  # 4 bytes, `policy_digest` of the policy's name
    partition: int
    kid: int


class Keyring:
    """The keys that sign and verify. Immutable."""

    def __init__(self, keys: Sequence[Key]) -> None:
        if not keys:
            raise ConfigError("there must be at least one key", "SUREFOOT_KEYS")
        self._keys = {key.kid: key for key in keys}
        if len(self._keys) != len(keys):
            raise ConfigError("key ids must differ", "SUREFOOT_KEYS")
        self.signing = keys[0]

    @classmethod
    def parse(cls, text: str) -> Keyring:
        """Read `kid:hex,kid:hex`. Raises ConfigError, never repeating key material."""
        return cls([_parse_key(part) for part in text.split(",")])

    def draw_key(self, kid: int) -> bytes:
        """The draw key behind a recorded key id. Raises UnknownDecision when the key has been retired."""
        if kid not in self._keys:
            raise UnknownDecision(f"key {kid} is not in the keyring any more")
        return self._keys[kid].draw

    def mint(self, at_ms: int, policy: bytes, random: bytes, partition: int = 0) -> list[str]:
        """Make len(random) / RANDOM_BYTES ids, signed with the first key."""
        head = at_ms.to_bytes(6, "big") + policy + bytes([partition])
        tail, keyed = bytes([self.signing.kid]), blake2b(digest_size=_TAG_BYTES, key=self.signing.tag)
        ids = []
        for start in range(0, len(random), RANDOM_BYTES):
            body = head + random[start : start + RANDOM_BYTES] + tail
            tag = keyed.copy()  # costs a third of another one
            tag.update(body)
            ids.append((body + tag.digest()).hex())
        return ids

    def verify(self, text: str) -> DecisionId:
        """Read an id. Raises UnknownDecision when it is malformed or was not issued under these keys."""
        try:
            raw = bytes.fromhex(text) if len(text) == ID_LENGTH and text == text.lower() else b""
        except ValueError:
            raw = b""
        if not raw:
            raise UnknownDecision("this is not a decision id", "decision_id")
        body, tag = raw[:_BODY_BYTES], raw[_BODY_BYTES:]
        key = self._keys.get(body[-1])
        expected = blake2b(body, digest_size=_TAG_BYTES, key=key.tag).digest() if key else b""
        if not hmac.compare_digest(tag, expected):
            raise UnknownDecision("this decision id was never issued here", "decision_id")
        return DecisionId(text, int.from_bytes(body[:6], "big"), body[6:10], body[10], body[-1])


def policy_digest(policy: str) -> bytes:
    """Four bytes that stand for a policy's name inside an id."""
    return blake2b(policy.encode(), digest_size=4, person=b"surefoot-policy").digest()


def _parse_key(part: str) -> Key:
    kid, separator, secret = part.strip().partition(":")
    if not separator or not kid.isascii() or not kid.isdigit() or int(kid) > 255:
        raise ConfigError("each key is kid:hex with kid 0 to 255", "SUREFOOT_KEYS")
    try:
        raw = bytes.fromhex(secret)
    except ValueError:
        raw = b""
    if len(raw) != KEY_BYTES:
        raise ConfigError(f"the secret of key {kid} must be {KEY_BYTES} bytes as hexadecimal", "SUREFOOT_KEYS")
    return Key.derive(int(kid), raw)
