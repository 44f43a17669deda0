"""Who may call, and what is written down of it: the parts for that, built and run together.

Duty: from settings to callers, tokens, audit log and chain, wired to each other. It decides nothing.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import AsyncExitStack
from typing import NamedTuple

from service.audit_chain import Chain
from service.audit_files import Mirror
from service.audit_log import AuditLog
from service.callers import Callers
from service.clock import Clock
from service.metrics import Metrics
from service.redis_streams import RedisStreams
from service.settings import Settings
from service.slots import host_id
from service.token_store import POLL_S, TokenStore


class Admission(NamedTuple):
    """What lets callers in."""

    callers: Callers
    tokens: TokenStore
    audit: AuditLog
    chain: Chain

    async def follow_tokens(self) -> None:
        """Learn which tokens stand, and tell which were used, for ever."""
        while True:
            used, self.callers.used = self.callers.used, set()
            for token in used:
                self.tokens.used(token)
            await self.tokens.run_once()
            await asyncio.sleep(POLL_S)


async def admit(
    settings: Settings, streams: RedisStreams, clock: Clock, metrics: Metrics, stack: AsyncExitStack
) -> Admission:
    """Build the parts; `stack` closes them."""
    client = settings.client_token.get_secret_value() if settings.client_token else None
    admin = settings.admin_token.get_secret_value() if settings.admin_token else secrets.token_urlsafe(24)
    rates = {"rate": settings.admin_rate, "failures_per_minute": settings.auth_failures_per_minute}
    callers = Callers(client, admin, clock, metrics, **rates)
    tokens = TokenStore(streams, settings.data_dir, clock, callers.publish)
    await tokens.start()
    folder = settings.data_dir / "audit"
    audit = AuditLog(folder, f"{host_id(settings.data_dir)}-{secrets.token_hex(6)}", clock)
    chain = Chain(streams, Mirror(folder), audit, metrics)
    stack.push_async_callback(chain.aclose)
    return Admission(callers, tokens, audit, chain)
