"""EDGE: what the service keeps in Redis. Key names, scripts, codec of replies.

Keys (all of one policy share the hash tag `{policy}`; the suffixes stand in `join_script/1_call.lua`):

    sf:{policy}:d:<id>  r:<id>  l:<id>               decisions; rewards that stand or wait; late ones already told
    sf:{policy}:e:<episode>:<step>  w:…  t:<episode>  s:<id>     episodes: states, who waits, order by time
    sf:{policy}:z:<episode>  x:…  o:…  g:…           episodes: last decision, end, who collects, rewards of the whole
    sf:{policy}:due  early  ord  whole  ends         what is open, by time
    sf:{policy}:kw:<id>                              whose records of n steps wait for this decision
    sf:{policy}:wm  seen  ev  up  horizon  hold      lanes and time
    sf:{policy}:transitions  nstep  late  correction  quarantined  orphan       streams
    sf:{policy}:alone:<stream>                       what `trimming.py` keeps: since when groups have no consumers
    sf:{policy}:lost                                 lane -> events that are gone; trainers read it
    sf:{policy}:idem:<digest>                        Idempotency-Key: claim, then answer
    sf:keyring                                       the signing keys, made once
    sf:policies                                      names of policies that were pushed or deployed at run time
    sf:told                                          what `control.py` keeps: which policy was changed last, as a hint
    sf:workers                                       what `roll.py` keeps: which workers are alive, what they serve
    sf:audit                                         what `audit_chain.py` keeps: the audit log, one for all policies
    sf:tokens  tokens:used                           what `token_store.py` keeps: tokens by hash, when they were used
    sf:{policy}:versions  blob:<sha256>:<n>          what `redis_store.py` keeps: versions by label, files in pieces
    sf:{policy}:control  gone:<label>                what `control.py` keeps: the deployment; labels being deleted
    sf:{policy}:calibration                          what `calibration.py` keeps: the monitor's sums, its alarms
    sf:{policy}:explore  explore:<kind>:<window>  burn    what `leases.py` keeps: exploration's budget, lent in portions
    sf:{policy}:lim:k:<digest>  all  h:<holder>  memory    what `limit_calls.py` keeps: limits on executions
    sf:{policy}:shadow:<version>                     what `shadow_stream.py` keeps: what shadows have scored
    sf:{policy}:estimates  estimates:through         what `estimate_store.py` keeps: live estimates
    sf:{policy}:leader                               what `leader.py` keeps: which worker leads
    sf:{policy}:mem:<digest>                         what `memory_store.py` keeps: episodes by name, their last step

Strategy: one round trip for each call; `redis_connection.py` sends it once, and the shipper decides what is repeated.
Promise: a call raises StoreAway when it may work later, Refused when Redis will not take just these events; it never
hangs. What it raises besides is a bug.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b, sha1
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal

from redis.exceptions import NoScriptError, RedisError, ResponseError

from service.acks import By, judge, questions, settled, unknown_command
from service.join import JoinConfig as JoinConfig
from service.redis_connection import TIMEOUT_S as TIMEOUT_S
from service.redis_connection import Client, answered, translated
from service.redis_connection import connect as connect
from service.shipcall import Acks, Confirm, Gap, ShipCall, Shipped
from service.store_facts import StoreFacts, read_facts

# A claim without an answer: its worker died on the way. Far beyond any decision's duration.
CLAIM_MS = 10_000
KEYRING = "sf:keyring"
POLICIES = "sf:policies"

SCRIPT = b"\n".join(part.read_bytes() for part in sorted((Path(__file__).parent / "join_script").glob("*.lua")))
_READ = b"""
local raw = redis.call('GET', KEYS[1] .. ':d:' .. ARGV[1])
if not raw then return false end
local d = cmsgpack.unpack(string.sub(raw, 2))
local closed = string.sub(raw, 1, 1) == 'C'
local out = {closed and d[14] or 'pending'}
for i = 1, 13 do out[i + 1] = d[i] end
for i = 15, 17 do out[i] = closed and d[i] or '' end
local said = {}
if closed then said = d[18] and {d[18]} or said else
  local waiting = redis.call('GET', KEYS[1] .. ':r:' .. ARGV[1])
  if waiting then said = cmsgpack.unpack(waiting) end
end
out[18] = said[1] and said[1][10] and 1 or 0
for i, r in ipairs(said) do out[18 + i] = {r[1], r[3], r[8], r[9]} end
return out
"""


_SETTLE = b"""
local held = redis.call('GET', KEYS[1])
if held ~= ARGV[1] and (held or ARGV[2] == '') then return end
if ARGV[2] == '' then redis.call('DEL', KEYS[1]) else redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) end
"""


@dataclass(frozen=True, slots=True)
class Counts:
    """What one call of the join gave birth to, and what is pending after it."""

    joined: int
    defaulted: int
    void: int
    quarantined: int
    late: int
    correction: int
    orphan: int
    lost: int  # events of a hole that nothing can fill
    pending: int


@dataclass(frozen=True, slots=True)
class StoredReward:
    """A reward as the join holds it; of several that were aggregated, what the last said, with their number."""

    reward_id: str
    at_ms: int
    reward: float
    record: bytes


@dataclass(frozen=True, slots=True)
class StoredDecision:
    """A decision as the join holds it."""

    id: str
    state_name: Literal["pending", "joined", "defaulted", "void", "quarantined"]
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
    reward: StoredReward | None  # the one that stands; beside a default: the correction
    collected: tuple[StoredReward, ...]  # those that wait to be aggregated

    @property
    def waiting_for(self) -> Literal["reward", "rewards", "successor"] | None:
        if self.state_name != "pending":
            return None
        if self.collected:
            return "rewards"
        return "reward" if self.reward is None else "successor"


class RedisStreams:
    """The service's use of one Redis."""

    def __init__(
        self,
        client: Client,
        configs: Callable[[str], JoinConfig] = lambda policy: JoinConfig(),
        on_counts: Callable[[str, Counts], None] = lambda policy, counts: None,
    ) -> None:
        self._client = client
        self._configs = configs
        self._on_counts = on_counts
        self._by: By = "waitaof"  # how replicas are asked
        self._claimant = token_hex(8)  # whose claims on idempotency keys are ours

    async def ship(self, call: ShipCall) -> Shipped | Gap:
        """Apply a lane's events. Raises StoreAway, or Refused when Redis cannot take just these."""
        # The server's clock: producers' clocks may disagree, and how long one was silent must not depend on whose.
        arguments = script_arguments(call, self._configs(call.policy), now_ms=0)
        reply, acks = await self._join(base(call.policy), arguments, call.confirm)
        if reply[0] == b"GAP":
            return Gap(int(reply[1]))
        flat = reply[2]
        verdicts = tuple((int(flat[i]), flat[i + 1].decode()) for i in range(0, len(flat), 2))
        self._on_counts(call.policy, Counts(*(int(each) for each in (*reply[3], reply[4]))))
        return Shipped(int(reply[1]), verdicts, acks, more=bool(reply[5]))

    async def read_decision(self, policy: str, decision_id: str) -> StoredDecision | None:
        """Read one decision, open or closed, or None when there is no record of it. Raises StoreAway."""
        fields = await answered(self._command("EVAL", _READ, 1, base(policy), decision_id))
        return None if fields is None else _stored(decision_id, fields)

    async def probe(self) -> StoreFacts:
        """Ask the server what it is. Raises StoreAway."""
        info = await answered(self._command("INFO"))
        return read_facts(info, await self._config("appendfsync"))

    async def keyring(self, candidate: str) -> str:
        """Store the candidate keyring if there is none yet, and give the one that stands. Raises StoreAway."""
        standing = await answered(self._command("SET", KEYRING, candidate, "NX", "GET", get=True))
        return candidate if standing is None else str(standing.decode())

    async def idempotent_begin(self, policy: str, key: str, digest: str) -> tuple[str, bytes | None] | None:
        """Claim a key: None when it is ours now, else the digest that holds it and its answer, if there is one yet."""
        claim = self._claim(digest), "NX", "GET", "PX", CLAIM_MS
        held = await answered(self._command("SET", _idem(policy, key), *claim, get=True))
        if held is None:
            return None
        stands, _, answer = held.partition(b"\0")
        return stands.partition(b":")[0].decode(), answer or None

    async def idempotent_finish(self, policy: str, key: str, digest: str, response: bytes, ttl_s: float) -> None:
        """Store the answer under a claimed key, unless the claim has lapsed and another holds it."""
        ttl_ms = max(1, int(ttl_s * 1000))
        kept = digest.encode() + b"\0" + response
        await self.script(_SETTLE, _idem(policy, key), self._claim(digest), kept, ttl_ms)

    async def idempotent_release(self, policy: str, key: str, digest: str) -> None:
        """Give up a claim whose request was refused; one that has lapsed may be another's by now."""
        await self.script(_SETTLE, _idem(policy, key), self._claim(digest), "", 0)

    def _claim(self, digest: str) -> bytes:
        return f"{digest}:{self._claimant}".encode() + b"\0"

    async def command(self, *command: Any, timeout_s: float = TIMEOUT_S) -> Any:
        """Run one command for `redis_store.py` or `control.py`. Raises StoreAway."""
        return await answered(self._command(*command, timeout_s=timeout_s))

    async def script(self, source: bytes, key: str, *arguments: Any) -> Any:
        """Run another file's script, by its digest if the server knows it. Raises StoreAway."""
        try:
            return await answered(self._command("EVALSHA", _sha(source), 1, key, *arguments))
        except NoScriptError:
            return await answered(self._command("EVAL", source, 1, key, *arguments))

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _join(self, key: str, arguments: list[Any], confirm: Confirm | None) -> tuple[Any, Acks | None]:
        """Run the join's script; with `confirm`, ask behind it on the same connection who has what it wrote."""
        for script in (("EVALSHA", _sha(SCRIPT)), ("EVAL", SCRIPT)):
            with contextlib.suppress(NoScriptError):
                command = (*script, 1, key, *arguments)
                if confirm is None:
                    return await answered(self._command(*command), events=True), None
                return await answered(self._in_order(command, confirm), events=True)
        raise AssertionError("EVAL never answers NOSCRIPT")

    async def _in_order(self, command: tuple[Any, ...], confirm: Confirm) -> tuple[Any, Acks]:
        by, self._by = self._by, "waitaof"  # a server that does not answer may come back as a newer one
        replies = await self._client.in_order(
            command,
            *questions(confirm, by),
            timeout_s=confirm.wait_s + TIMEOUT_S,
            until=lambda reply: settled(reply, confirm, by),
        )
        if isinstance(replies[0], Exception):
            raise replies[0]
        if len(replies) == 1:  # a gap
            return replies[0], Acks(False, 0, 0, "none", "nothing was applied")
        self._by = "wait" if by == "wait" or unknown_command(replies[-1]) else "waitaof"
        return replies[0], judge(replies[-1], confirm, by)

    def _command(self, *command: Any, **options: Any) -> Awaitable[Any]:
        return self._client.execute_command(*command, **options)

    async def _config(self, name: str) -> str | None:
        """One server setting, or None where the server does not tell (managed services often refuse CONFIG)."""
        try:
            found = await self._command("CONFIG GET", name)
        except ResponseError:
            return None
        except (RedisError, OSError) as error:
            raise translated(error) from error
        return str(next(iter(found.values()), None)) if found else None


def script_arguments(call: ShipCall, config: JoinConfig, now_ms: int) -> list[Any]:
    """Build ARGV of the join; with `now_ms` 0 it takes the server's time."""
    return [
        call.producer, call.epoch, call.first_seq, call.count, call.through_ms, now_ms, int(call.force), int(call.bye),
        config.max_lag_ms, config.sweep_limit, config.record_ttl_ms, config.successor_ttl_ms, config.default_reward,
        config.aggregation, config.low, config.high, config.n_step, config.episode_ttl_ms, *call.blobs,
    ]  # fmt: skip


@cache
def _sha(source: bytes) -> str:
    return sha1(source, usedforsecurity=False).hexdigest()  # how Redis names scripts


def base(policy: str) -> str:
    """The key that all keys of a policy begin with; its braces are the hash tag."""
    return f"sf:{{{policy}}}"


def _idem(policy: str, key: str) -> str:
    return f"{base(policy)}:idem:{blake2b(key.encode(), digest_size=16).hexdigest()}"


def _stored(decision_id: str, fields: list[Any]) -> StoredDecision:
    state, episode, step, due, at, action, observed, mask, record, _, _, producer, epoch, seq = fields[:14]
    end, next_id, order = (each.decode() or None for each in fields[14:17])
    said = tuple(StoredReward(each[0].decode(), int(each[1]), float(each[2]), each[3]) for each in fields[18:])
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
        reward=said[0] if fields[17] else None,
        collected=() if fields[17] else said,
    )
