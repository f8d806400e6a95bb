"""Fixtures of the tests of allocation."""

from __future__ import annotations

import pytest

from cptq.types import Event


@pytest.fixture
def events() -> list[Event]:
    """A list to collect what a stage emits: pass `events.append` as `emit`."""
    return []
