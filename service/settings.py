"""Every setting of the service, read from `SUREFOOT_*` variables. Unknown ones are refused, by name.

Duty: names, types, bounds and defaults; nothing else. A default cites why it has its value. Nothing here opens a
file or a socket, so that `surefoot config show` works anywhere.
"""

from __future__ import annotations

import os
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from policies.errors import ConfigError
from service.shipcall import Confirm
from surefoot.redis_url import parse

PREFIX = "SUREFOOT_"

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Bytes = Annotated[int, Field(gt=0)]


class Settings(BaseSettings):
    """What an operator can set. Units stand in the names: `_s` seconds, `_ms` milliseconds, `_bytes` bytes."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0 takes a free one and prints it.")
    data_dir: Path = Field(Path("data"), description="Spool, embedded Valkey and snapshots; kept between runs.")
    policies: Path | None = Field(
        default=None, description="Directory of policies to load at start; unset: the bundled ones (CartPole)."
    )
    redis_url: SecretStr | None = Field(
        default=None,
        description="Server, Sentinels or cluster (docs/redis.md); unset: an embedded Valkey in the data directory.",
    )
    store: str | None = Field(
        default=None,
        description="Where pushed versions lie: an fsspec URL (file://, s3://, …) or a folder; unset: in Redis.",
    )
    # The promise of the design; a small network takes 1 MB, so 100 stay far below what one large one takes.
    max_loaded: int = Field(100, ge=1, description="Most versions loaded at once; live ones are loaded regardless.")
    # Beyond a failover, or a restart of Redis that has a large file to load: tens of seconds.
    max_stale_s: Seconds = Field(
        60.0, ge=1, description="Without Redis for so long, the champion alone decides: challengers get nothing."
    )
    bundle_key: Path | None = Field(
        default=None, description="PEM public key; set, only bundles with a valid model.sig are loaded."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where networks run; cuda without a usable GPU is an error, never a silent CPU."
    )
    durability: Literal["memory", "process", "node", "replicated"] = Field(
        "process",
        description="What an answered event survives: nothing (memory), SIGKILL (process), power loss of this machine "
        "(node), its loss (replicated).",
    )
    replication_replicas: int = Field(
        1, ge=1, description="Replicas of Redis that must have an event on disk; for durability replicated."
    )
    # Several hundred times what a healthy pair with appendfsync always takes; everysec needs more than 2.
    replication_timeout_s: Seconds = Field(
        1.0, gt=0, le=60, description="An event waits this long for them; then rewards get 503."
    )
    # Each is a process with its own networks; a machine has some hundred cores.
    workers: int = Field(1, ge=1, le=256, description="Processes that serve, of a core each (docs/deploy.md).")

    admin_token: SecretStr | None = Field(
        default=None, description="Bearer token for /admin; made and printed when unset."
    )
    client_token: SecretStr | None = Field(
        default=None, description="Bearer token for /act, /reward, /decisions and /metrics; required off loopback."
    )
    # Reading a deployment takes about a millisecond of the event loop: a tenth of it at most, whoever asks.
    admin_rate: float = Field(
        100.0, gt=0, allow_inf_nan=False, description="Requests to /admin per second, of one token and of one address."
    )
    # A person mistypes a few times; NIST SP 800-63B (5.2.2) allows 100 failures in all.
    auth_failures_per_minute: float = Field(
        10.0, gt=0, allow_inf_nan=False, description="Wrong tokens per minute from one address; more get 429."
    )
    tls_cert: Path | None = Field(
        default=None, description="PEM certificate with its chain; set, the service speaks HTTPS only."
    )
    tls_key: Path | None = Field(default=None, description="PEM private key of the certificate.")
    tls_client_ca: Path | None = Field(
        default=None, description="PEM authorities; set, callers need a certificate of one of them (mutual TLS)."
    )
    allow_open: bool = Field(False, description="Serve without a client token on a non-loopback address.")
    keys: SecretStr | None = Field(
        default=None,
        description="Signing keys as kid:hex,kid:hex (kid 0 to 255, 32 bytes each); the first signs, all verify.",
    )

    # 1 MiB holds an 84×84×4 observation written as JSON with room to spare for its batch endpoint in chunks.
    max_body_bytes: Bytes = Field(1 << 20, description="Larger request bodies get 413.")
    body_timeout_s: Seconds = Field(5.0, description="Headers, and then a body, that take longer get 408.")
    max_batch: int = Field(1024, ge=1, le=65536, description="Most rows in one inference call or batch request.")

    # A caller who has waited for a second has mostly gone; the design's deadline.
    deadline_s: float = Field(
        1.0, gt=0, le=3600, description="A question that is not decided within this gets 503 (docs/overload.md)."
    )
    max_deadline_s: float = Field(
        10.0, gt=0, le=3600, description="Most that a request's own X-Request-Timeout-Ms may be."
    )
    # 15 ms of the event loop; larger batches are hardly cheaper for each row.
    max_concurrency: int = Field(256, ge=1, le=65536, description="Most rows that a worker decides at once.")

    # 100,000 episodes of an LSTM with 128 cells, before and after their last step.
    recurrent_memory_bytes: Bytes = Field(256 << 20, description="What recurrent versions of a policy may remember.")
    recurrent_ttl_s: Seconds = Field(3_600.0, description="An episode without a step for so long is forgotten.")
    # Half of the default deadline: a question whose network hangs gets the fallback while its caller is still there.
    inference_timeout_s: Seconds = Field(0.5, description="A network call that takes longer gets the fallback.")

    # 64 MiB is some 200,000 small decisions: half a minute of full speed on one core.
    ledger_buffer_bytes: Bytes = Field(64 << 20, description="Events waiting in memory before the ledger refuses.")
    spool_min_free_bytes: int = Field(64 << 20, ge=0, description="Stop accepting events below this much free disk.")
    max_lag_s: Seconds = Field(300.0, ge=1, description="A silent producer holds reward deadlines back so long.")
    # About 1 KB each: at 100 decisions a second an hour's take 0.4 GB of Redis, a day's 9 GB (docs/memory.md).
    record_ttl_s: Seconds = Field(3_600.0, ge=1, description="A closed decision's record stays readable for this long.")
    # A trainer that is away for a week's holiday misses nothing; the size is some 700,000 small transitions.
    stream_max_age_s: Seconds = Field(
        604_800.0, ge=1, description="A stream that no group reads keeps its entries for this long."
    )
    stream_max_bytes: Bytes = Field(1 << 30, description="A stream that no group reads takes this much of Redis.")
    # What `surefoot safety test` tries rules on by default.
    stream_keep: int = Field(
        1_000, ge=0, description="Newest entries of a stream that stay though every group has them."
    )
    group_ttl_s: Seconds = Field(
        604_800.0, ge=1, description="A group that nobody asks for this long raises an alert; it is never removed."
    )
    # Some 0.4 KB each for a few actions: 40 MB for each shadow.
    shadow_stream_keep: int = Field(100_000, ge=1, description="Newest scores of each shadow that stay in Redis.")
    # The event loop waits for a shadow's Python at most this share of the time; 0.2 scores thousands of rows a second.
    shadow_cpu_share: float = Field(0.2, gt=0, le=1, description="Share of a core that each shadow may take.")
    verdict_wait_s: Seconds = Field(0.05, description="A reward waits this long for the join's verdict.")
    idempotency_ttl_s: Seconds = Field(86_400.0, description="A repeated Idempotency-Key is recognised for this long.")

    drain_delay_s: Seconds = Field(0.0, description="On SIGTERM, answer 503 on readiness this long before closing.")
    grace_s: Seconds = Field(10.0, description="Then running requests get at most this long to finish.")
    trace_sample: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of decisions traced, when an OTLP endpoint is set and the caller's trace says nothing.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")

    @field_validator("data_dir", "policies", "bundle_key", "tls_cert", "tls_key", "tls_client_ca")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return path.expanduser().absolute() if path else None

    @property
    def confirm(self) -> Confirm | None:
        """Whom an event waits for before it counts as recorded."""
        replicated = self.durability == "replicated"
        return Confirm(self.replication_replicas, self.replication_timeout_s) if replicated else None

    @field_validator("redis_url")
    @classmethod
    def _names_a_redis(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None:
            parse(url.get_secret_value())
        return url

    @property
    def is_loopback(self) -> bool:
        """Whether `host` can be reached from this machine alone."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False


def load_settings() -> Settings:
    """Read the settings from the environment.

    Raises ConfigError naming the variable when one is unknown or has a wrong value, or when the service would be
    open to the network without a token.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)
    if unknown:
        raise ConfigError(f"unknown setting {unknown[0]}; `surefoot config show` lists the known ones", unknown[0])
    try:
        settings = Settings()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = PREFIX + "_".join(str(part) for part in first["loc"]).upper()
        raise ConfigError(f"{field}: {first['msg']}", field) from None
    if (settings.tls_cert is None) != (settings.tls_key is None) or (settings.tls_client_ca and not settings.tls_cert):
        raise ConfigError(
            "TLS needs SUREFOOT_TLS_CERT and SUREFOOT_TLS_KEY, both; SUREFOOT_TLS_CLIENT_CA goes with them",
            "SUREFOOT_TLS_CERT",
        )
    if settings.inference_timeout_s >= settings.deadline_s:
        raise ConfigError(
            f"SUREFOOT_INFERENCE_TIMEOUT_S is {settings.inference_timeout_s:g} and must be below SUREFOOT_DEADLINE_S, "
            f"which is {settings.deadline_s:g}: a network that hangs would never get as far as the fallback",
            "SUREFOOT_INFERENCE_TIMEOUT_S",
        )
    if not (settings.is_loopback or settings.client_token or settings.allow_open):
        raise ConfigError(
            f"{settings.host} can be reached from the network: set SUREFOOT_CLIENT_TOKEN, or SUREFOOT_ALLOW_OPEN=true "
            "if something in front of the service checks who calls",
            "SUREFOOT_CLIENT_TOKEN",
        )
    return settings
