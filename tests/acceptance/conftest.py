"""Names that no other test uses."""

from __future__ import annotations

import uuid

import pytest


@pytest.fixture
def policy() -> str:
    return f"p-{uuid.uuid4().hex[:12]}"
