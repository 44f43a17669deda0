"""What a trainer gets from `corrections`, made by hand and by the service's own join."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
import redis

from service.decision import RewardFlags
from service.join import JoinConfig
from surefoot import Correction, Corrections, Unreadable, corrections, transitions
from tests.surefoot.stream_entries import correction_fields, key
from tests.surefoot.test_streams_joined import NOW_MS, Shipper, decision, reward
from tests.surefoot.valkey import Valkey


def reading(valkey: Valkey, policy: str, **options: Any) -> Corrections:
    return corrections(policy, "g", "c", redis_url=valkey.url, max_wait_s=0.0, **options)


def add(store: redis.Redis, policy: str, n: int, **changes: Any) -> bytes:
    stream_id: Any = store.xadd(key(policy, "correction"), correction_fields(n, **changes))  # type: ignore[arg-type]
    assert isinstance(stream_id, bytes)
    return stream_id


def pending(store: redis.Redis, policy: str) -> int:
    return int(store.xpending(key(policy, "correction"), "g")["pending"])


def test_they_come_one_by_one_and_are_acknowledged_when_the_next_is_asked_for(
    valkey: Valkey, store: redis.Redis, policy: str
) -> None:
    add(store, policy, 1, r="-0.5", ri="late")
    add(store, policy, 2, r="", j="void")
    add(store, policy, 1, r="", j="quarantined")
    with reading(valkey, policy) as stream:
        first = next(stream)
        assert (first.decision_id, first.producer, first.epoch, first.seq) == (f"{1:060x}", "w0", 1, 2)
        assert (first.reward, first.join, first.reward_id, first.reward_at_ms) == (-0.5, "joined", "late", 1051)
        assert (first.metrics, first.why) == (None, "overtaken")
        assert pending(store, policy) == 3
        second, third = stream
        assert (second.join, third.join, third.decision_id) == ("void", "quarantined", first.decision_id)
        assert math.isnan(second.reward)
        assert math.isnan(third.reward)
        assert pending(store, policy) == 0


def test_what_was_not_acknowledged_comes_again(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    for n in range(3):
        add(store, policy, n)
    with reading(valkey, policy, auto_ack=False) as stream:
        found: list[Correction] = list(stream)
        found[1].ack()
        found[1].ack()
        assert stream.statistics() == {
            "delivered": 3, "copies": 0, "claimed": 0, "reconnects": 0, "gaps": 0, "in_flight": 2,
        }  # fmt: skip
    assert [each.seq for each in reading(valkey, policy)] == [0, 4]


@pytest.mark.parametrize("changes", [{"v": 2}, {"e": "x"}, {"r": "nan"}, {"at": ""}, {"rd": b"\xc1"}], ids=str)
def test_one_that_cannot_be_read_is_named(
    valkey: Valkey, store: redis.Redis, policy: str, changes: dict[str, Any]
) -> None:
    stream_id = add(store, policy, 0, **changes)
    with reading(valkey, policy) as stream, pytest.raises(Unreadable, match=stream_id.decode()):
        next(stream)


def test_a_default_that_was_overtaken_is_corrected(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    shipper = Shipper(store, policy, JoinConfig(max_lag_ms=1, high="10.0"))
    shipper.ship(*(decision(n, "") for n in range(3)), through_ms=NOW_MS + 5_000)
    shipper.ship(reward(0), reward(1, RewardFlags.NOT_EXECUTED), msgspec.structs.replace(reward(2), reward="99.0"))
    with transitions(policy, "g", "c", redis_url=valkey.url, max_wait_s=0.0) as stream:
        rows = {each: seq for batch in stream for each, seq in zip(batch.ids, batch.seqs, strict=True)}
        assert len(rows) == 3
    with reading(valkey, policy) as corrected:
        found = list(corrected)
    assert [(each.decision_id, each.seq) for each in found] == list(rows.items())
    assert [each.join for each in found] == ["joined", "void", "quarantined"]
    assert found[0].reward == 0.1
