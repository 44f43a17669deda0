"""EDGE: read a recorded decision and the signing keys as an operator would, and draw it again."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from policies.errors import DecisionExpired, NotReady, UnknownDecision
from policies.store import BUNDLED, read_directory
from service.control import Control
from service.decision import action_text, decode_record
from service.history import replay, wire_action
from service.ids import Keyring, policy_digest
from service.keys import obtain_keyring
from service.redis_streams import JoinConfig, RedisStreams, connect
from service.settings import Settings
from service.valkey import socket_url


def redis_url_of(settings: Settings) -> str:
    """The Redis of a deployment: the one that is set, else the embedded one of its data directory."""
    return settings.redis_url.get_secret_value() if settings.redis_url else socket_url(settings.data_dir)


async def replay_decision(decision_id: str, settings: Settings) -> dict[str, Any]:
    """Replay one decision. Gives recorded and replayed values side by side, and whether they are the same.

    Raises UnknownDecision, DecisionExpired or StoreAway.
    """
    streams = RedisStreams(connect(redis_url_of(settings)), lambda policy: JoinConfig())
    async with contextlib.aclosing(streams):
        setting = settings.keys.get_secret_value() if settings.keys else None
        keyring = await obtain_keyring(setting, streams, settings.data_dir)
        if keyring is None:
            raise NotReady("there are no signing keys: Redis is away, and no snapshot is kept")
        names = {each.name for each in read_directory(settings.policies or BUNDLED)}
        names |= (await Control(streams).read()).keys()
        return await _compare(decision_id, streams, keyring, {policy_digest(name): name for name in names})


async def _compare(
    decision_id: str, streams: RedisStreams, keyring: Keyring, policies: Mapping[bytes, str]
) -> dict[str, Any]:
    policy = policies.get(keyring.verify(decision_id).policy)
    if policy is None:
        raise UnknownDecision(
            "this decision belongs to a policy that is neither in SUREFOOT_POLICIES nor pushed", "decision_id"
        )
    stored = await streams.read_decision(policy, decision_id)
    if stored is None:
        raise DecisionExpired("there is no record of this decision", "decision_id")
    record = decode_record(stored.record)
    again = replay(decision_id, stored.mask, record, keyring.draw_key(record.key_id))
    recorded = {
        "action": wire_action(stored.action, record),
        "explored": record.explored,
        "propensity": record.propensity,
        "log_propensity": record.log_propensity,
    }
    replayed = {
        "action": wire_action(action_text(again.action), record),
        "explored": again.explored,
        "propensity": again.propensity,
        "log_propensity": again.log_propensity,
    }
    return {"decision_id": decision_id, "recorded": recorded, "replayed": replayed, "same": recorded == replayed}
