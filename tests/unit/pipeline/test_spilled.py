"""The most activations on the disk: counted before a run, and what really lay there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cptq.checkpoint.memory import BASE, Memory
from cptq.checkpoint.spill import Kept, Spill
from cptq.config import (
    AnalyzeSettings,
    CalibrationSettings,
    CompressSettings,
    ModelSettings,
)
from cptq.pipeline import disk
from cptq.pipeline import inputs as inputs_module
from cptq.pipeline.analyze import analyze
from cptq.pipeline.compress import compress
from cptq.pipeline.inputs import load_inputs
from cptq.pipeline.recorder import Recorder
from cptq.pipeline.spilled import bound_compress, bound_pass
from tests.conftest import TinyModel

pytestmark = [
    pytest.mark.usefixtures("same_process", "short_manual", "no_memory"),
    pytest.mark.slow,
]
CALIBRATION = CalibrationSettings(calibration="pydoc", samples=8, seqlen=64, batch_size=2)


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of memory in which nothing waits."""
    monkeypatch.setattr(
        inputs_module,
        "choose_memory",
        lambda asked, folder, processes=1: Memory(total=BASE, folder=folder),
    )


class Watch:
    """The most bytes that lay in the folder of activations at once."""

    def __init__(self) -> None:
        self.most = 0
        self.bounds: list[int] = []

    def look(self, folder: Path) -> None:
        sizes = [path.stat().st_size for path in folder.iterdir()]
        self.most = max(self.most, sum(sizes))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    found, keep = Watch(), Spill.keep

    def kept(self: Spill, tensor: torch.Tensor) -> Kept:
        made = keep(self, tensor)
        if self._directory is not None:
            found.look(Path(self._directory.name))
        return made

    monkeypatch.setattr(Spill, "keep", kept)

    for name in ("bound_compress", "bound_analyze"):
        bound = getattr(disk, name)

        def remember(inputs: Any, bound: Callable[[Any], int] = bound) -> int:
            found.bounds.append(bound(inputs))
            return found.bounds[-1]

        monkeypatch.setattr(disk, name, remember)
    return found


def settings_for(model: Path, out: Path, **more: Any) -> CompressSettings:
    wanted: dict[str, Any] = {"calibration": CALIBRATION, "group_size": 16, "target": "4bit"}
    return CompressSettings(model=ModelSettings(model=str(model)), out=out, **wanted | more)


def ignore(_event: object) -> None:
    """Drop events."""


@pytest.mark.parametrize(
    ("arch", "more", "share"),
    [
        ("llama", {"allocator": "even"}, 0.45),
        ("llama", {"allocator": "even", "compressor": "gptq"}, 0.45),
        pytest.param(
            *("llama", {"allocator": "even", "runtime": "cptq"}, 0.45), marks=pytest.mark.slow
        ),
        ("opt", {"allocator": "even", "runtime": "cptq"}, 0.45),
        pytest.param(*("llama", {"check_uniform": False}, 0.45), marks=pytest.mark.slow),
        pytest.param(*("llama", {}, 0.45), marks=pytest.mark.slow),
        pytest.param(
            *("llama", {"metric": "taylor-quantized", "check_uniform": False}, 0.45),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("llama", {"metric": "linearity", "check_uniform": False}, 0.45),
            marks=pytest.mark.slow,
        ),
        ("llama", {"refine": 2, "check_uniform": False}, 0.45),
        pytest.param(*("llama", {"allocator": "even", "tune": True}, 0.45), marks=pytest.mark.slow),
        pytest.param(*("bert", {"allocator": "even"}, 0.45), marks=pytest.mark.slow),
        pytest.param(*("bert", {"metric": "output"}, 0.45), marks=pytest.mark.slow),
    ],
)
def test_a_compression_never_has_more_on_the_disk_than_was_counted(
    arch: str,
    more: dict[str, Any],
    share: float,
    tiny_model: TinyModel,
    tmp_path: Path,
    watch: Watch,
) -> None:
    compress(settings_for(tiny_model(arch), tmp_path / "out", **more), ignore)
    (bound,) = watch.bounds
    assert share * bound <= watch.most <= bound


@pytest.mark.parametrize(
    ("more", "share"),
    [
        ({"metrics": ("output",)}, 0.9),
        ({"metrics": ("pq-index",)}, 0),
        ({"metrics": ("output", "cca", "linearity", "pruning")}, 0.9),
        ({"metrics": ("output", "kl"), "validate": True, "pairs": 2, "targets": ("4bit",)}, 0.9),
    ],
)
def test_an_analysis_never_has_more_on_the_disk_than_was_counted(
    more: dict[str, Any], share: float, tiny_model: TinyModel, tmp_path: Path, watch: Watch
) -> None:
    settings = AnalyzeSettings(
        model=ModelSettings(model=str(tiny_model("llama"))),
        calibration=CALIBRATION,
        out=tmp_path / "out",
        group_size=16,
        **more,
    )
    analyze(settings, ignore)
    (bound,) = watch.bounds
    assert share * bound <= watch.most <= bound


def test_what_fits_into_memory_is_not_counted(tiny_model: TinyModel, tmp_path: Path) -> None:
    inputs = load_inputs(settings_for(tiny_model("llama"), tmp_path / "out"), Recorder(ignore))
    most = bound_compress(inputs)
    assert most > 0
    inputs.model.spill.limit = most - 1
    assert bound_compress(inputs) == most
    inputs.model.spill.limit = most
    assert bound_compress(inputs) == 0
    inputs.model.spill.limit = None
    assert bound_compress(inputs) == 0


def test_a_pass_has_a_state_per_block_and_position(tiny_model: TinyModel, tmp_path: Path) -> None:
    inputs = load_inputs(settings_for(tiny_model("llama"), tmp_path / "out"), Recorder(ignore))
    model, batches = inputs.model, inputs.calibration.batches
    width, blocks = model.config.hidden_size, len(model.blocks)
    state, largest = 8 * 64 * width * 4, 2 * 64 * width * 4
    assert bound_pass(model, batches, back=True) == (blocks + 1) * state + largest
    assert bound_pass(model, batches, back=False) == state + largest
