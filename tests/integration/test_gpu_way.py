"""Every command with `--device cuda`, on a GPU that is none (`tests.fake_gpu`)."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import cptq
from cptq.activation_sparsity import METHODS
from cptq.compression import COMPRESSORS
from cptq.compression.scores import SCORES
from cptq.evaluation import footprint_process
from cptq.evaluation.bench.with_transformers import TransformersEngine
from cptq.sensitivity import METRICS
from cptq.types import Event
from tests.conftest import TinyModel
from tests.tiny_models import SENTENCES
from tests.unit.evaluation.task_data import write_glue

pytestmark = pytest.mark.usefixtures("same_process", "gpu")


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """A short text, few candidates."""
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES * 8))
    return {
        **{"calibration": str(tmp_path / "text.txt"), "samples": 3, "seqlen": 24, "batch_size": 2},
        **{"bits": (4, 8), "device": "cuda", "out": tmp_path / "out", "progress": ignore},
    }


def ignore(_event: Event) -> None: ...


def compress(model: Path, options: dict[str, Any], **more: Any) -> Path:
    """Compress to 7 bits; return the directory."""
    given: dict[str, Any] = {"target": "7bit", "check_uniform": False, **options, **more}
    cptq.compress(model, **given)
    out: Path = given["out"]
    return out


def test_a_causal_model_goes_the_whole_way(tiny_model: TinyModel, options: dict[str, Any]) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    small = compress(model, options, evaluate=False)
    text = {"tasks": (options["calibration"],), "seqlen": 24, "limit": 2, "progress": ignore}
    here, there = (cptq.evaluate(model, device=d, **text) for d in ("cpu", "cuda"))
    assert there.summary.comparison.results[0].value == pytest.approx(
        here.summary.comparison.results[0].value, rel=1e-5
    )
    # the artifact stores float16 scales, so that it computes in another type than its baseline
    cptq.evaluate(small, baseline=str(model), device="cuda", **text)
    cptq.generate(small, "one two", device="cuda", max_new_tokens=2, progress=ignore)


def test_a_classifier_is_compressed_and_judged(
    tiny_model: TinyModel, options: dict[str, Any], tmp_path: Path
) -> None:
    small = compress(tiny_model("bert", num_hidden_layers=1), options, evaluate=False)
    data = {"data_dir": write_glue(tmp_path, "sst2"), "limit": 4, "progress": ignore}
    cptq.evaluate(small, tasks=("glue/sst2",), device="cuda", **data)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_metric(
    tiny_model: TinyModel, options: dict[str, Any], arch: str, dtype: torch.dtype
) -> None:
    more = {"metrics": tuple(METRICS), "samples": 9, "sparsity_analysis": True}
    cptq.analyze(tiny_model(arch, dtype=dtype), **options | more)


@pytest.mark.slow
def test_scores_are_validated(tiny_model: TinyModel, options: dict[str, Any]) -> None:
    more = {"validate": True, "pairs": 4, "targets": ("5bit",)}
    cptq.analyze(tiny_model("llama", dtype=torch.float16), **options | more)


WAYS: dict[str, dict[str, Any]] = {
    **{name: {"compressor": name} for name in COMPRESSORS},
    "vllm": {"runtime": "vllm"},
    "asymmetric": {"runtime": "cptq", "asymmetric": True, "embedding_bits": 6},
    "row scales": {"runtime": "cptq", "scales": "row"},
    "checked": {"check_uniform": True, "refine": 2},
    "2:4": {"runtime": "cptq", "sparsity": ("2:4",)},
    **{name: {"runtime": "cptq", "sparsity": ("50%",), "sparsity_score": name} for name in SCORES},
    "tuned": {"tune": True, "samples": 6},
    "little memory": {"runtime": "cptq", "max_memory": "640MB"},
    **{
        name: {"runtime": "cptq", "activation_sparsity": f"{name}:50%"}
        for name in METHODS
        if name != "exact"
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_compress(tiny_model: TinyModel, options: dict[str, Any], way: str) -> None:
    """The artifact then runs, is measured and opened, too."""
    small = compress(tiny_model("llama", dtype=torch.float16), options, **WAYS[way])
    use(small)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gpt2", "opt", "qwen3_moe", "gpt_neox", "mpnet", "bert-mlm"])
def test_other_families(tiny_model: TinyModel, options: dict[str, Any], arch: str) -> None:
    runtime = "cptq" if arch == "gpt2" else "transformers"
    compress(tiny_model(arch), options, runtime=runtime)


def use(small: Path) -> None:
    """Open an artifact in every way there is."""
    model = cptq.load(small, device="cuda")
    ids_BT = torch.tensor([[3, 4, 5]], device="cuda")
    assert model(input_ids=ids_BT).logits.is_cuda
    sampling = {"temperature": 0.8, "top_p": 0.9}
    cptq.generate(small, "one two", device="cuda", max_new_tokens=2, progress=ignore, **sampling)
    engine = TransformersEngine(
        **{"path": str(small), "kind": "causal-lm", "device": "cuda:0", "dtype": "float16"},
        **{"threads": 1, "trust_remote_code": False},
    )
    engine.load()
    assert engine.run([[3, 4, 5]], 2)["later_seconds"] > 0
    arguments = [str(small), "--kind", "causal-lm", "--device", "cuda:0", "--dtype", "float16"]
    found = footprint_process.measure_checkpoint(
        footprint_process._build_parser().parse_args(arguments)
    )
    assert found["peak_device_bytes"] > 0


@pytest.mark.slow
def test_a_run_is_resumed(
    tiny_model: TinyModel, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(import_module("cptq.pipeline.compress"), "write_artifact", stop)
        with pytest.raises(KeyboardInterrupt):
            compress(tiny_model("llama"), options)
    compress(tiny_model("llama"), options, resume=True)
