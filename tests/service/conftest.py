"""What the tests of the service share: a real Valkey on a unix socket, and a policy name that no other test uses."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from service.valkey import EmbeddedValkey
from tests.service.valkeys import SMALL, nothing_stays_in
from tests.surefoot.valkey import Valkey


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="sf-") as directory, Valkey(Path(directory)) as server:
        yield server.url


@pytest.fixture
def store(valkey_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(valkey_url, protocol=2) as client:
        yield client


@pytest.fixture
def policy() -> str:
    return f"p-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def nothing_stays(tmp_path: Path) -> Iterator[None]:
    """Fail a test that leaves a process running below `tmp_path`, and end that process."""
    with nothing_stays_in(tmp_path):
        yield


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    """An owner of `tmp_path / "data"`, not started."""
    mine = EmbeddedValkey(tmp_path / "data", maxmemory_bytes=SMALL)
    yield mine
    mine.stop()
