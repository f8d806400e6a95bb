"""Fixtures that every test may use; what is missing on a machine skips with its reason."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test calls out
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as `cptq` itself sets it
# Tests compare packed models with dense ones: activations stay float32, in new processes too. The
# tests of the kernels ask for 8 bits themselves.
os.environ["CPTQ_EXACT"] = "1"
# Before triton is imported: its kernels are interpreted, on a CPU. With 0 they run on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

from cptq.artifact import reload
from cptq.data.pydoc_text import load_topics
from cptq.inference import operations
from cptq.types import Event, Notice, Progress, SpeedReport
from tests.fake_gpu import pretend_gpu
from tests.tiny_models import build_tiny_model
from tests.unit.artifact.same_process import run_here

REPOSITORY = Path(__file__).resolve().parents[1]
TinyModel = Callable[..., Path]


class Heard(list[Event]):
    """An `emit` that keeps the events it gets."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    @property
    def notices(self) -> list[str]:
        """The messages of the notices."""
        return [event.message for event in self if isinstance(event, Notice)]

    @property
    def stages(self) -> set[str]:
        """The stages of which progress was reported."""
        return {event.stage for event in self if isinstance(event, Progress)}


@pytest.fixture
def heard() -> Heard:
    """An `emit` to pass on, and to read afterwards."""
    return Heard()


def pytest_configure() -> None:
    """Small tensors gain nothing from many threads, and threads fight on a small machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_fsync() -> Iterator[None]:
    """No test cuts the power: files need not be on the disk when a step is finished."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def _existing(path: Path, what: str) -> Path:
    if not path.exists():
        pytest.skip(f"needs {what}: {path} is absent (CPTQ_ASSETS names the directory of assets)")
    return path


@pytest.fixture(scope="module")
def same_process() -> Iterator[None]:
    """Artifacts of the module are verified in this process: a new one takes seconds to start.

    Their speed is not measured, which would open each once more.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reload, "_run", run_here)
        nothing = SpeedReport(command="", why="in a test")
        patch.setattr("cptq.pipeline.speed._measure", lambda *_: nothing)
        yield


@pytest.fixture(scope="module")
def short_manual() -> Iterator[None]:
    """The text pydoc is a fifth of its topics: a tiny model takes longer to tokenize it whole than
    to calibrate on what it draws."""
    topics, origin = load_topics()
    some = {name: topics[name] for name in sorted(topics)[1::5]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cptq.data.text.load_topics", lambda: (some, origin))
        yield


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that is none (`tests.fake_gpu`); packed weights are multiplied by the reference."""
    entries = {"reference": operations.BACKENDS._entries["reference"]}
    monkeypatch.setattr(operations.BACKENDS, "_entries", entries)
    with pretend_gpu():
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def assets() -> Path:
    """The directory of real models and data: CPTQ_ASSETS, else ../shared/assets."""
    default = REPOSITORY.parent / "shared" / "assets"
    return _existing(Path(os.environ.get("CPTQ_ASSETS") or default), "real models and data")


@pytest.fixture(scope="session")
def data_dir(assets: Path) -> Path:
    """WikiText and GLUE in their original layout, as CPTQ_DATA would name it."""
    return _existing(assets / "data", "the evaluation data")


@pytest.fixture
def cptq_data(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`data_dir`, with CPTQ_DATA set to it for the time of the test."""
    monkeypatch.setenv("CPTQ_DATA", str(data_dir))
    return data_dir


@pytest.fixture(scope="session")
def stories(assets: Path) -> Path:
    """stories260k: a trained causal Llama of 260,032 float32 weights."""
    return _existing(assets / "models" / "stories260k", "the model stories260k")


@pytest.fixture(scope="session")
def minilm_sst2(assets: Path) -> Path:
    """minilm-l6-sst2: a trained BERT classifier of 22.7M float16 weights."""
    return _existing(assets / "models" / "minilm-l6-sst2", "the model minilm-l6-sst2")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A factory: `tiny_model("llama", tied=True)` -> the path of a random checkpoint.

    Arguments are those of `tests.tiny_models.build_tiny_model`. A checkpoint is built once per
    session and shared: copy it before changing it.
    """
    root = tmp_path_factory.mktemp("tiny")
    built: dict[str, Path] = {}

    def make(arch: str, **options: Any) -> Path:
        key = repr((arch, sorted(options.items())))
        if key not in built:
            built[key] = build_tiny_model(root / f"{arch}-{len(built)}", arch, **options)
        return built[key]

    return make
