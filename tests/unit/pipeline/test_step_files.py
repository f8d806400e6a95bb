"""The files of steps: exact, whole, and recognised when they are not."""

from __future__ import annotations

import errno
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cptq.pipeline import step_files
from cptq.pipeline.step_files import list_step_files, pack, read_step, unpack, write_step
from cptq.sensitivity import METRICS
from cptq.sensitivity.measure import measure
from cptq.types import (
    Budget,
    Candidate,
    CompressedLayer,
    LayerResult,
    LayerSpec,
    Notice,
    Plan,
    SensitivityTable,
)
from tests.conftest import TinyModel
from tests.reference.sensitivity import loaded, random_calibration

CANDIDATES = (
    Candidate(bits=4, group_size=64),
    Candidate(bits=3, group_size=16, symmetric=False, sparsity=0.123, pattern="unstructured"),
    Candidate(bits=8, float8="e5m2"),
    Candidate(bits=4, scales="row"),
    Candidate(bits=16),
)
TABLE = SensitivityTable(
    metric="output",
    score_unit="nats",
    scores={"b": {c: 0.1 * i for i, c in enumerate(CANDIDATES)}, "a": {CANDIDATES[0]: 1e-300}},
    per_unit={"b": math.pi, "a": math.inf},
    per_block={3: 0.1 + 0.2, 1: -0.0},
    model_fingerprint="m",
    calibration_fingerprint="c",
    seed=1,
    tokens=7,
    seconds=1.5,
    details={"pairs": ((1, "x"), [2.5, None, True]), "curve": {0.5: 1}},
)
PLAN = Plan(
    model_fingerprint="m",
    budget=Budget(limit_bytes=9, asked="4bit"),
    allocator="knapsack",
    metric=None,
    table_digest=None,
    choices=dict(zip("edcba", CANDIDATES, strict=True)),
    predicted_bytes=3,
    predicted_loss=0.1,
    notes=("one", "two"),
)


def make_layer(codes: torch.Tensor, **more: Any) -> CompressedLayer:
    spec = LayerSpec(name="x", block=0, role="q", kind="linear", shape=(2, 4), dtype="F32")
    result = LayerResult(
        name="x",
        candidate=CANDIDATES[1],
        group_size=0,
        nbytes=8,
        weight_error=0.1,
        output_error=None,
        seconds=0.25,
        notes=("a note",),
    )
    scale = torch.tensor([[0.1], [math.nan]], dtype=torch.bfloat16)
    return CompressedLayer(spec=spec, result=result, codes=codes, scale=scale, **more)


def check_same(found: Any, wanted: Any) -> None:
    """Compare types, orders, and numbers to the bit."""
    assert type(found) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        assert found.dtype is wanted.dtype
        assert found.shape == wanted.shape
        bits = [x.contiguous().reshape(-1).view(torch.uint8) for x in (found, wanted)]
        assert torch.equal(*bits)
    elif isinstance(wanted, dict):
        check_same(list(found.items()), list(wanted.items()))
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for pair in zip(found, wanted, strict=True):
            check_same(*pair)
    elif hasattr(wanted, "__dataclass_fields__"):
        for name in wanted.__dataclass_fields__:
            check_same(getattr(found, name), getattr(wanted, name))
    else:
        assert repr(found) == repr(wanted)


WHOLE = torch.arange(8, dtype=torch.int8)
VALUES = {
    "scalars": [None, True, 1, -0.0, 0.1, math.inf, "ä", ()],
    "table": {"output": TABLE},
    "plan": (PLAN, None),
    "notice": (Notice(kind="info", subject="a", message="b"),),
    "integers": [make_layer(WHOLE.view(2, 4), zero=torch.ones(2, 1, dtype=torch.int8))],
    "views": [make_layer(WHOLE.view(2, 4)), make_layer(WHOLE.view(4, 2).T, mask=WHOLE > 3)],
    "e4m3": [make_layer(torch.randn(2, 4).to(torch.float8_e4m3fn))],
    "e5m2": [make_layer(torch.randn(2, 4).to(torch.float8_e5m2))],
    "tensors": {"a": torch.tensor(0.5), "b": torch.zeros(0, 3), "c": torch.randn(3).half()},
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_comes_back_exactly(tmp_path: Path, name: str) -> None:
    file = write_step(tmp_path, 3, name, VALUES[name])
    (listed,) = list_step_files(tmp_path)
    assert listed == file
    assert (file.number, file.step, file.intact) == (3, name, True)
    check_same(read_step(file), VALUES[name])


def test_every_metric_has_a_table_that_can_be_kept(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    tables = measure(
        model,
        random_calibration(model, rows=12, length=24),
        metrics=list(METRICS),
        candidates=[Candidate(bits=4, group_size=16), Candidate(bits=16)],
        seed=0,
        emit=lambda event: None,
    )
    for table in tables.values():
        found = unpack(*pack(table))
        assert found == table
        assert found.digest == table.digest


def test_what_cannot_be_kept_is_no_silent_loss() -> None:
    with pytest.raises(TypeError, match="a step cannot hold set"):
        pack({"a": [{1}]})
    assert pack(np.float64(0.1)) == (0.1, {})


def test_every_flipped_bit_and_every_lost_byte_is_seen(tmp_path: Path) -> None:
    file = write_step(tmp_path, 0, "run", {"a": make_layer(WHOLE.view(2, 4))})
    raw = file.path.read_bytes()
    for place in range(0, len(raw), 41):
        file.path.write_bytes(raw[:place] + bytes([raw[place] ^ 4]) + raw[place + 1 :])
        assert not file.intact
        file.path.write_bytes(raw[:place])
        assert not file.intact
    file.path.write_bytes(raw)
    assert file.intact
    file.path.unlink()
    assert not file.intact


def test_other_files_are_no_steps(tmp_path: Path) -> None:
    file = write_step(tmp_path, 0, "run", 1)
    file.path.rename(tmp_path / "000-run.partial")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / f"1-x.{'0' * 63}g.safetensors").write_bytes(b"")
    assert list_step_files(tmp_path) == []


@pytest.mark.parametrize("moment", ["save_file", "_hash_file", "sync_directory"])
def test_a_full_disk_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def fail(*_args: Any, **_more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(step_files, moment, fail)
    with pytest.raises(OSError, match="No space left"):
        write_step(tmp_path, 0, "run", {"a": torch.ones(3)})
    assert all(file.intact for file in list_step_files(tmp_path))
    assert not list(tmp_path.glob("*.partial"))


def test_the_library_tells_system_errors_as_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_step(tmp_path / "absent", 0, "run", {"a": torch.ones(3)})


def test_what_is_read_back_is_mapped_from_the_file(tmp_path: Path) -> None:
    file = write_step(tmp_path, 0, "block-0", torch.ones(1 << 20, dtype=torch.int8))
    found = read_step(file)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert file.path.name in maps.read_text()
    file.path.unlink()
    assert int(found.sum()) == 1 << 20  # the mapping outlives the name
