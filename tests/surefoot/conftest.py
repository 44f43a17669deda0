"""What the tests of the client package share: a Valkey, and a policy name that no other test uses."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.surefoot.valkey import Valkey


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A temporary directory with a short name: a socket's path may not exceed 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="sf-") as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def valkey() -> Iterator[Valkey]:
    with tempfile.TemporaryDirectory(prefix="sf-") as directory, Valkey(Path(directory)) as server:
        yield server


@pytest.fixture
def store(valkey: Valkey) -> Iterator[redis.Redis]:
    with valkey.client() as client:
        yield client


@pytest.fixture
def policy() -> str:
    return f"p-{uuid.uuid4().hex[:12]}"
