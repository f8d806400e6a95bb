"""Loaded tiny models, and data of every task in the original layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cptq.checkpoint.loader import load_model
from cptq.checkpoint.model import LoadedModel
from cptq.config import ModelSettings
from tests.tiny_models import SENTENCES
from tests.unit.evaluation import task_data

Load = Callable[..., LoadedModel]


@pytest.fixture
def load(tiny_model: Callable[..., Path]) -> Load:
    """`load("bert", num_labels=3)` -> a tiny random model, loaded anew; a Path is loaded too."""

    def make(arch: str | Path, **options: Any) -> LoadedModel:
        path = arch if isinstance(arch, Path) else tiny_model(arch, **options)
        return load_model(ModelSettings(model=str(path), device="cpu"), lambda event: None)

    return make


@pytest.fixture
def file(tmp_path: Path) -> str:
    """The path of a text of a few sentences, three times over."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(SENTENCES * 3))
    return str(path)


@pytest.fixture(scope="session")
def every_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory that holds made-up data of every task."""
    return task_data.write_all(tmp_path_factory.mktemp("data"))
