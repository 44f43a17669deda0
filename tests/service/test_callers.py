"""Tokens are recognised by hash, end in time, are for their policies; who guesses is slowed down, and nobody else."""

from __future__ import annotations

import secrets
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from policies.errors import Forbidden, SurefootError, TooMany, Unauthorized
from service.body import Head
from service.callers import ANYONE, Callers
from service.clock import ManualClock
from service.metrics import Metrics
from service.throttle import Throttle, bucket_of
from service.tokens import BYTES, PREFIX, Token, Tokens, by_hash, hash_of, recognise, text_of

STRONG = "x" * 22


def token(text: str = STRONG, **fields: Any) -> Token:
    given: dict[str, Any] = {"id": "t-1", "role": "operator", "owner": "ops", "created_at_ms": 0, "created_by": "admin"}
    return Token(**given | {"hash": hash_of(text.encode())} | fields)


def scope(text: str | None, address: str = "10.0.0.1") -> dict[str, Any]:
    headers = [] if text is None else [(b"authorization", b"Bearer " + text.encode())]
    return {"headers": headers, "client": (address, 5)}


def head(text: str | None, address: str = "10.0.0.1") -> Head:
    return Head.of({**scope(text, address), "path": "/act"})


def callers(clock: ManualClock, client: str | None = "client", admin: str = "admin", rate: float = 5.0) -> Callers:
    return Callers(client, admin, clock, Metrics(CollectorRegistry()), rate=rate, failures_per_minute=3.0)


def test_a_token_is_text_with_a_prefix_and_all_its_random_bits() -> None:
    found = {text_of(secrets.token_bytes(BYTES)) for _ in range(1000)}
    assert len(found) == 1000
    assert all(each.startswith(PREFIX) and len(each) == 46 for each in found)
    assert text_of(bytes(32)) == "sf_" + "A" * 43


def test_a_token_is_recognised_until_it_ends() -> None:
    table = by_hash([token(expires_at_ms=1_000), token("other", id="t-2")])
    assert recognise(table, STRONG.encode(), 999) == token(expires_at_ms=1_000)
    assert recognise(table, STRONG.encode(), 1_000) is None
    assert recognise(table, b"other", 10**15) == token("other", id="t-2")
    assert recognise(table, hash_of(b"other").encode(), 0) is None  # who reads the document cannot call with it
    assert recognise({hash_of(b"a"): token("b")}, b"a", 0) is None


def test_documents_follow_each_other() -> None:
    one = Tokens().plus(token())
    assert one == Tokens(1, {"t-1": token()})
    assert one.minus("t-1") == Tokens(2)
    assert one.minus("nothing").tokens == one.tokens


def test_a_caller_is_let_in_by_a_token_that_grants_it() -> None:
    door = callers(ManualClock())
    assert door.hot(head("client"), "act").role == "client"
    assert door.hot(head("admin"), "act").role == "admin"
    for text in (None, "", "wrong", "Bearer client"):
        with pytest.raises(Unauthorized):
            door.hot(head(text, "10.9.9.9"), "act")
    door.publish([token(role="viewer")])
    with pytest.raises(Forbidden):
        door.hot(head(STRONG), "act")
    door.publish([])
    with pytest.raises(Unauthorized):
        door.hot(head(STRONG), "act")


def test_without_a_client_token_clients_need_none_and_admins_do() -> None:
    door = callers(ManualClock(), client=None)
    assert door.hot(head(None), "reward") is ANYONE
    assert door.identify(scope("whatever"), "metrics") is ANYONE
    for permission in ("read", "audit", "tokens", None):
        with pytest.raises(Unauthorized):
            door.identify(scope(None), permission)


def test_the_same_text_for_both_settings_is_the_admin_s() -> None:
    assert callers(ManualClock(), client="same", admin="same").hot(head("same"), "act").role == "admin"


def test_a_stored_token_never_takes_the_place_of_a_setting_s() -> None:
    door = callers(ManualClock())
    door.publish([token("admin", role="viewer")])
    assert door.identify(scope("admin"), "tokens").role == "admin"


def test_a_token_reaches_its_policies_alone() -> None:
    door = callers(ManualClock())
    door.publish([token(policies=("one", "two"))])
    caller = door.identify(scope(STRONG), "operate")
    door.permit(caller, "operate", "one")
    door.permit(caller, "read", "")
    with pytest.raises(Forbidden, match="'three'"):
        door.permit(caller, "operate", "three")
    with pytest.raises(Forbidden, match="'tokens'"):
        door.permit(caller, "tokens", "")


def outcome(door: Callers, text: str | None, address: str = "10.0.0.1") -> type[SurefootError] | str:
    try:
        return door.identify(scope(text, address), "read").name
    except SurefootError as error:
        return type(error)


def test_wrong_tokens_are_taken_a_few_times_a_minute() -> None:
    clock = ManualClock()
    door = callers(clock, admin="short", rate=1000.0)
    door.publish([token()])
    assert [outcome(door, "guess") for _ in range(4)] == [Unauthorized] * 3 + [TooMany]
    assert outcome(door, "short") is TooMany  # it may be a guess that came true
    assert outcome(door, STRONG) == "t-1"  # it cannot
    assert outcome(door, "short", "10.0.0.2") == "admin"
    assert outcome(door, None) is Unauthorized  # that was no guess
    clock.advance(20_000)
    assert outcome(door, "short") == "admin"
    assert outcome(door, "guess") is Unauthorized
    assert outcome(door, "guess") is TooMany


def test_a_long_setting_is_let_in_whoever_guesses_beside_it() -> None:
    door = callers(ManualClock(), admin="long-" * 5, rate=1000.0)
    assert [outcome(door, "guess") for _ in range(5)][-1] is TooMany
    assert outcome(door, "long-" * 5) == "admin"


def test_hot_routes_slow_guesses_down_as_well() -> None:
    door = callers(ManualClock())
    found = []
    for _ in range(5):
        with pytest.raises((Unauthorized, TooMany)) as refused:
            door.hot(head("guess"), "act")
        found.append(refused.value.status)
    assert found == [401] * 3 + [429] * 2


def test_requests_have_a_rate_for_each_token_and_each_address() -> None:
    clock = ManualClock()
    door = callers(clock, rate=5.0)
    door.publish([token(), token("other", id="t-2")])
    assert [outcome(door, STRONG) for _ in range(11)] == ["t-1"] * 10 + [TooMany]
    assert outcome(door, "other") is TooMany  # of the same address
    assert outcome(door, STRONG, "10.0.0.2") is TooMany  # the same token
    assert outcome(door, "other", "10.0.0.2") == "t-2"
    with pytest.raises(TooMany) as refused:
        door.identify(scope(STRONG), "read")
    assert refused.value.retry_after_s == 1
    clock.advance(1_000)
    assert [outcome(door, STRONG) for _ in range(6)] == ["t-1"] * 5 + [TooMany]


def test_what_is_urgent_has_no_rate_for_those_who_are_known() -> None:
    door = callers(ManualClock(), rate=5.0)
    assert {door.identify(scope("admin"), "operate", urgent=True).name for _ in range(100)} == {"admin"}
    for kind in (Unauthorized, Unauthorized, Unauthorized, TooMany):
        with pytest.raises(kind):
            door.identify(scope("guess", "10.0.0.9"), "operate", urgent=True)


def test_calls_without_a_token_use_up_nobody_else_s_rate() -> None:
    door = callers(ManualClock(), rate=5.0)
    assert [outcome(door, None) for _ in range(11)] == [Unauthorized] * 10 + [TooMany]
    assert outcome(door, "admin") == "admin"


def test_refused_changes_are_taken_a_few_times_a_minute() -> None:
    clock = ManualClock()
    door = callers(clock, rate=1000.0)
    caller = door.identify(scope("client"), "operate")
    for kind in (Forbidden, Forbidden, Forbidden, TooMany):
        with pytest.raises(kind):
            door.permit(caller, "operate", "toy")


def test_a_bucket_fills_with_time_and_no_further() -> None:
    throttle = Throttle(rate=0.5, burst=2.0)
    assert [throttle.take("a", 0.0) for _ in range(3)] == [0, 0, 2]
    assert throttle.take("a", 1.0) == 1
    assert throttle.take("a", 2.0) == 0
    assert [throttle.take("a", 1_000.0) for _ in range(3)] == [0, 0, 2]


def test_buckets_are_bounded_in_number() -> None:
    throttle = Throttle(rate=0.001, burst=1.0, max_names=3)
    assert [throttle.take(name, 0.0) for name in "abcd"] == [0] * 4
    assert throttle.take("d", 0.0) > 0
    assert throttle.take("a", 0.0) == 0  # the one seen longest ago was forgotten


def test_addresses_of_one_network_share_a_bucket() -> None:
    assert bucket_of("10.1.2.3") == "10.1.2.3"
    assert bucket_of("::ffff:10.1.2.3") == "10.1.2.3"
    assert bucket_of("2001:db8:1:2:3:4:5:6") == bucket_of("2001:db8:1:2::9") == "2001:db8:1:2::/64"
    assert bucket_of("2001:db8:1:3::9") != bucket_of("2001:db8:1:2::9")
    assert bucket_of("") == ""
