"""Loaded tiny models and a way to hear what is emitted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cptq.checkpoint.loader import load_model
from cptq.checkpoint.model import LoadedModel
from cptq.config import ModelSettings
from cptq.types import Event, Notice

Load = Callable[..., LoadedModel]


class Heard(list[Event]):
    """An `emit` that keeps what it hears."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    @property
    def notices(self) -> list[str]:
        """The messages of the notices."""
        return [event.message for event in self if isinstance(event, Notice)]


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def load(tiny_model: Callable[..., Path]) -> Load:
    """`load("bert", num_labels=3)` -> a tiny random model, loaded anew; a Path is loaded too."""

    def make(arch: str | Path, **options: Any) -> LoadedModel:
        path = arch if isinstance(arch, Path) else tiny_model(arch, **options)
        return load_model(ModelSettings(model=str(path), device="cpu"), lambda event: None)

    return make
