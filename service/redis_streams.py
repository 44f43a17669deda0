"""EDGE: the only importer of redis. Key names, scripts, codec of replies, the client's construction.

Keys (all of one policy share the hash tag `{policy}`; the suffixes stand in `join.lua`):

    sf:{policy}:d:<id>  r:<id>  l:<id>               decisions; rewards that stand or wait; late ones already told
    sf:{policy}:e:<episode>:<step>  w:…  t:<episode>  s:<id>     episodes: states, who waits, order by time
    sf:{policy}:due  early  ord                      what is open, by time
    sf:{policy}:wm  seen  ev  up  horizon  hold      lanes and time
    sf:{policy}:transitions  late  orphan            streams
    sf:{policy}:lost                                 lane -> events that are gone; trainers read it
    sf:{policy}:idem:<digest>                        Idempotency-Key: claim, then answer
    sf:keyring                                       the signing keys, made once
    sf:policies                                      names of policies that were pushed or deployed at run time
    sf:{policy}:versions  blob:<sha256>:<n>          what `redis_store.py` keeps: versions by label, files in pieces
    sf:{policy}:control  gone:<label>                what `control.py` keeps: the deployment; labels being deleted
    sf:{policy}:calibration                          what `calibration.py` keeps: the monitor's sums, its alarms
    sf:{policy}:explore  explore:<kind>:<window>  burn    what `leases.py` keeps: exploration's budget, lent in portions
    sf:{policy}:lim:k:<digest>  all  h:<holder>  memory    what `limit_calls.py` keeps: limits on executions
    sf:{policy}:mem:<digest>                         what `memory_store.py` keeps: episodes by name, their last step

Strategy: redis-py's async client retries ten times by default and would repeat a script whose reply was lost; here it
never retries, times out soon, and the shipper decides.
Promise: a call raises StoreAway when it may work later, Refused when Redis will not take just these events; it never
hangs. What it raises besides is a bug.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b, sha1
from pathlib import Path
from typing import Any, Literal, cast

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import DataError, NoScriptError, RedisError, ResponseError

from policies.errors import StoreAway
from service.join import JoinConfig as JoinConfig
from service.shipcall import Gap, Refused, ShipCall, Shipped

TIMEOUT_S = 0.5
# How an answer begins that gives the command back undone, so that the same may work later. For others redis-py has
# classes of their own (READONLY, OOM, LOADING, NOPERM, …), and takes the word off.
PASSING = frozenset(
    {"BUSY", "MISCONF", "NOREPLICAS", "CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN", "MOVED", "ASK", "UNKILLABLE", "NOAUTH"}
)
# A claim without an answer: its worker died on the way. Far beyond any decision's duration.
CLAIM_MS = 10_000
KEYRING = "sf:keyring"
POLICIES = "sf:policies"

SCRIPT = (Path(__file__).parent / "join.lua").read_bytes()
_READ = b"""
local raw = redis.call('GET', KEYS[1] .. ':d:' .. ARGV[1])
if not raw then return false end
local d = cmsgpack.unpack(string.sub(raw, 2))
local closed = string.sub(raw, 1, 1) == 'C'
local r = false
if closed then r = d[16] else
  local waiting = redis.call('GET', KEYS[1] .. ':r:' .. ARGV[1])
  if waiting then r = cmsgpack.unpack(waiting)[1] end
end
local out = {closed and d[12] or 'pending', d[1], d[2], d[3], d[4], d[5], d[6], d[7], d[8], d[9], d[10], d[11]}
for i = 13, 15 do out[i] = closed and d[i] or '' end
if r then out[16] = {r[1], r[3], r[8], r[9]} end
return out
"""


def connect(url: str) -> Redis:
    """Build the client for redis://, rediss:// or unix://. Nothing is sent before the first call."""
    return Redis.from_url(
        url,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=TIMEOUT_S,
        socket_connect_timeout=TIMEOUT_S,
        decode_responses=False,
    )


@dataclass(frozen=True, slots=True)
class Counts:
    """What one call of the join gave birth to, and what is pending after it."""

    joined: int
    defaulted: int
    void: int
    late: int
    orphan: int
    lost: int  # events of a hole that nothing can fill
    pending: int


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """What the connected server is, as far as it tells."""

    version: str
    role: str
    loading: bool
    appendonly: bool | None
    appendfsync: str | None
    maxmemory_policy: str | None


@dataclass(frozen=True, slots=True)
class StoredDecision:
    """A decision as the join holds it."""

    id: str
    state_name: Literal["pending", "joined", "defaulted", "void"]
    episode: str
    step: int
    due_ms: int
    at_ms: int
    action: str  # as `action_text` writes it
    state: bytes
    mask: bytes
    record: bytes
    producer: str
    epoch: int
    seq: int
    end: str | None
    next_id: str | None
    order: str | None
    reward_id: str | None
    reward_at_ms: int | None
    reward: float | None
    reward_record: bytes | None

    @property
    def waiting_for(self) -> Literal["reward", "successor"] | None:
        if self.state_name != "pending":
            return None
        return "reward" if self.reward is None else "successor"


class RedisStreams:
    """The service's use of one Redis."""

    def __init__(
        self,
        client: Redis,
        configs: Callable[[str], JoinConfig] = lambda policy: JoinConfig(),
        on_counts: Callable[[str, Counts], None] = lambda policy, counts: None,
    ) -> None:
        self._client = client
        self._configs = configs
        self._on_counts = on_counts

    async def ship(self, call: ShipCall) -> Shipped | Gap:
        """Apply a lane's events. Raises StoreAway, or Refused when Redis cannot take just these."""
        # The server's clock: producers' clocks may disagree, and how long one was silent must not depend on whose.
        reply = await self._script(base(call.policy), script_arguments(call, self._configs(call.policy), now_ms=0))
        if reply[0] == b"GAP":
            return Gap(int(reply[1]))
        flat = reply[2]
        verdicts = tuple((int(flat[i]), flat[i + 1].decode()) for i in range(0, len(flat), 2))
        self._on_counts(call.policy, Counts(*(int(each) for each in (*reply[3], reply[4]))))
        return Shipped(int(reply[1]), verdicts)

    async def read_decision(self, policy: str, decision_id: str) -> StoredDecision | None:
        """Read one decision, open or closed, or None when there is no record of it. Raises StoreAway."""
        fields = await self._answer(self._command("EVAL", _READ, 1, base(policy), decision_id))
        return None if fields is None else _stored(decision_id, fields)

    async def probe(self) -> StoreFacts:
        """Ask the server what it is. Raises StoreAway."""
        info = await self._answer(self._client.info())
        appendonly = await self._config("appendonly")
        return StoreFacts(
            version=str(info.get("valkey_version") or info.get("redis_version") or "unknown"),
            role=str(info.get("role", "unknown")),
            loading=bool(info.get("loading")),
            appendonly=None if appendonly is None else appendonly == "yes",
            appendfsync=await self._config("appendfsync"),
            maxmemory_policy=info.get("maxmemory_policy"),
        )

    async def keyring(self, candidate: str) -> str:
        """Store the candidate keyring if there is none yet, and give the one that stands. Raises StoreAway."""
        standing = await self._answer(self._client.set(KEYRING, candidate, nx=True, get=True))
        return candidate if standing is None else str(standing.decode())

    async def idempotent_begin(self, policy: str, key: str, digest: str) -> tuple[str, bytes | None] | None:
        """Claim a key: None when it is ours now, else the digest that holds it and its answer, if there is one yet."""
        claim = self._client.set(_idem(policy, key), digest.encode() + b"\0", nx=True, get=True, px=CLAIM_MS)
        held = await self._answer(claim)
        if held is None:
            return None
        stands, _, answer = held.partition(b"\0")
        return stands.decode(), answer or None

    async def idempotent_finish(self, policy: str, key: str, digest: str, response: bytes, ttl_s: float) -> None:
        """Store the answer under a claimed key."""
        kept = digest.encode() + b"\0" + response
        await self._answer(self._client.set(_idem(policy, key), kept, px=max(1, int(ttl_s * 1000))))

    async def idempotent_release(self, policy: str, key: str) -> None:
        """Give up a claim whose request was refused."""
        await self._answer(self._client.delete(_idem(policy, key)))

    async def command(self, *command: Any) -> Any:
        """Run one command for `redis_store.py` or `control.py`. Raises StoreAway."""
        return await self._answer(self._command(*command))

    async def script(self, source: bytes, key: str, *arguments: Any) -> Any:
        """Run another file's script, by its digest if the server knows it. Raises StoreAway."""
        try:
            return await self._answer(self._command("EVALSHA", _sha(source), 1, key, *arguments))
        except NoScriptError:
            return await self._answer(self._command("EVAL", source, 1, key, *arguments))

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _script(self, key: str, arguments: list[Any]) -> Any:
        try:
            return await self._answer(self._command("EVALSHA", _sha(SCRIPT), 1, key, *arguments), events=True)
        except NoScriptError:
            return await self._answer(self._command("EVAL", SCRIPT, 1, key, *arguments), events=True)

    def _command(self, *command: Any) -> Awaitable[Any]:
        return cast(Awaitable[Any], self._client.execute_command(*command))  # type: ignore[no-untyped-call]

    async def _answer(self, command: Awaitable[Any], events: bool = False) -> Any:
        try:
            return await command
        except (NoScriptError, DataError):  # the first is for `_script`; the second is a bug of ours
            raise
        except (RedisError, OSError) as error:
            raise _translate(error, events) from error

    async def _config(self, name: str) -> str | None:
        """One server setting, or None where the server does not tell (managed services often refuse CONFIG)."""
        try:
            found = await self._client.config_get(name)
        except ResponseError:
            return None
        except (RedisError, OSError) as error:
            raise _translate(error, events=False) from error
        return str(next(iter(found.values()), None)) if found else None


def script_arguments(call: ShipCall, config: JoinConfig, now_ms: int) -> list[Any]:
    """Build ARGV of the join; with `now_ms` 0 it takes the server's time."""
    return [
        call.producer, call.epoch, call.first_seq, call.count, call.through_ms, now_ms, int(call.force), int(call.bye),
        config.max_lag_ms, config.sweep_limit, config.record_ttl_ms, config.successor_ttl_ms, config.default_reward,
        *call.blobs,
    ]  # fmt: skip


@cache
def _sha(source: bytes) -> str:
    return sha1(source, usedforsecurity=False).hexdigest()  # how Redis names scripts


def base(policy: str) -> str:
    """The key that all keys of a policy begin with; its braces are the hash tag."""
    return f"sf:{{{policy}}}"


def _idem(policy: str, key: str) -> str:
    return f"{base(policy)}:idem:{blake2b(key.encode(), digest_size=16).hexdigest()}"


def _translate(error: Exception, events: bool) -> Exception:
    text = str(error)
    if events and type(error) is ResponseError and text.split(" ", 1)[0] not in PASSING:
        return Refused(text)
    return StoreAway(f"Redis does not answer: {text or type(error).__name__}")


def _stored(decision_id: str, fields: list[Any]) -> StoredDecision:
    state, episode, step, due, at, action, observed, mask, record, producer, epoch, seq = fields[:12]
    end, next_id, order = (each.decode() or None for each in fields[12:15])
    reward = fields[15] if len(fields) > 15 else None
    return StoredDecision(
        id=decision_id,
        state_name=state.decode(),
        episode=episode.decode(),
        step=int(step),
        due_ms=int(due),
        at_ms=int(at),
        action=action.decode(),
        state=observed,
        mask=mask,
        record=record,
        producer=producer.decode(),
        epoch=int(epoch),
        seq=int(seq),
        end=end,
        next_id=next_id,
        order=order,
        reward_id=reward[0].decode() if reward else None,
        reward_at_ms=int(reward[1]) if reward else None,
        reward=float(reward[2]) if reward else None,
        reward_record=reward[3] if reward else None,
    )
