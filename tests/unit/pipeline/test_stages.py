"""The stages of compress: each from frozen values to a frozen value, in any order that fits."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch

from cptq.artifact.reader import open_artifact
from cptq.calibration.batches import Batch
from cptq.calibration.divergence_from_dense import DivergenceFromDense
from cptq.calibration.objective import choose_objective
from cptq.config import CalibrationSettings, CompressSettings, ModelSettings
from cptq.pipeline.compress import compress, compress_layers, make_plan, measure_sensitivity
from cptq.pipeline.guard import Guard
from cptq.pipeline.inputs import CompressInputs, HeldOutText, load_inputs
from cptq.pipeline.plan_check import check_plan
from cptq.pipeline.recorder import Recorder
from cptq.pipeline.run_directory import open_run
from tests.conftest import TinyModel
from tests.tiny_models import SENTENCES, pair_tokenizer, tiny_tokenizer, write_rte

pytestmark = pytest.mark.usefixtures("same_process", "short_manual")
CALIBRATION = CalibrationSettings(calibration="pydoc", samples=4, seqlen=64, batch_size=2)


def recorder() -> Recorder:
    return Recorder(lambda event: None)


def load(model: Path, out: Path, **more: Any) -> CompressInputs:
    wanted: dict[str, Any] = {"calibration": CALIBRATION, "group_size": 16, "target": "3bit"}
    settings = CompressSettings(model=ModelSettings(model=str(model)), out=out, **wanted | more)
    return load_inputs(settings, recorder())


def rows_of(batches: Sequence[Batch]) -> set[tuple[int, ...]]:
    return {tuple(row.tolist()) for batch in batches for row in batch["input_ids"]}


def test_each_use_of_held_out_text_has_rows_of_its_own(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    inputs = load(tiny_model("llama"), tmp_path / "out", refine=2, tune=True)
    text = inputs.held_out
    parts = [rows_of(part) for part in (text.search, text.guard, text.tune, text.judge)]
    parts.append(rows_of(inputs.calibration.batches))
    assert all(parts)
    assert len(set.union(*parts)) == sum(map(len, parts))


@pytest.mark.parametrize(
    ("more", "uses"),
    [
        ({}, {"judge"}),
        ({"check_uniform": False}, {"judge"}),
        ({"check_uniform": False, "refine": 2}, {"search", "guard", "judge"}),
        ({"allocator": "uniform"}, {"judge"}),
        ({"check_uniform": False, "tune": True}, {"tune", "judge"}),
    ],
)
def test_text_is_held_out_for_what_uses_it(
    tiny_model: TinyModel, tmp_path: Path, more: dict[str, Any], uses: set[str]
) -> None:
    inputs = load(tiny_model("llama"), tmp_path / "out", **more)
    names = HeldOutText.__dataclass_fields__
    assert {name for name in names if getattr(inputs.held_out, name)} == uses
    plain = "allocator" not in more and "check_uniform" not in more
    assert inputs.compare_with_baseline is plain


def test_a_plan_is_made_again_from_the_same_values(tiny_model: TinyModel, tmp_path: Path) -> None:
    inputs = load(tiny_model("llama"), tmp_path / "out")
    before = {name: x.clone() for name, x in inputs.model.module.state_dict().items()}
    tables = measure_sensitivity(inputs, recorder())
    assert list(tables) == ["output"]
    assert inputs.tables == {}
    first, second = (make_plan(inputs, tables, recorder()) for _ in range(2))
    assert first == second
    assert first.predicted_bytes <= inputs.ledger.budget.limit_bytes
    for name, x in inputs.model.module.state_dict().items():
        assert torch.equal(x, before[name])
    with open_run(tmp_path / "out", {}, recorder(), resume=False, overwrite=False) as run:
        compressed = compress_layers(inputs, first, run, recorder())
    packed = [unit for unit in inputs.model.all_units if not first.choices[unit.name].dense]
    assert len(compressed.layers) == sum(len(unit.layers) for unit in packed)
    with pytest.raises(FrozenInstanceError):
        compressed.plan = second  # type: ignore[misc]


def test_plans_are_compared_with_the_model_as_it_came(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with one whose embeddings are rounded: what that costs is part of the divergence."""
    more = {"runtime": "cptq", "embedding_bits": 6, "target": "4.5bit", "group_size": 16}
    inputs = load(tiny_model("llama", tied=False), tmp_path / "out", **more)
    plan = make_plan(inputs, measure_sensitivity(inputs, recorder()), recorder())
    objective = choose_objective(inputs.model.kind, inputs.model.config)
    dense = DivergenceFromDense(inputs.model, inputs.held_out.judge, objective, units=False)
    seen: list[DivergenceFromDense] = []

    def stop(*args: Any) -> None:
        seen.extend(x for x in args if isinstance(x, DivergenceFromDense))
        raise KeyboardInterrupt

    # the package of the same name holds the function
    monkeypatch.setattr(sys.modules["cptq.pipeline.plan_check"], "keep_better_plan", stop)
    with pytest.raises(KeyboardInterrupt):
        check_plan(inputs, plan, Guard(inputs), recorder())
    with torch.no_grad():  # as if it had been compressed by now
        inputs.model.module.get_input_embeddings().weight.mul_(1.1)  # type: ignore[operator]
    assert torch.equal(seen[0].measure_rows(), dense.measure_rows())
    assert float(dense.measure_rows().mean()) > 0


def test_scores_that_no_plan_needs_are_not_measured(tiny_model: TinyModel, tmp_path: Path) -> None:
    inputs = load(tiny_model("llama"), tmp_path / "out", allocator="even")
    heard = recorder()
    assert measure_sensitivity(inputs, heard) == {}
    assert heard.timings == {}
    assert make_plan(inputs, {}, heard).metric is None


def test_a_classifier_is_compressed_on_pairs(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Every stage takes the token types; the sample for reloading has none, as llama.cpp."""
    shutil.copytree(tiny_model("bert"), tmp_path / "bert")
    pair_tokenizer().save_pretrained(tmp_path / "bert")
    write_rte(tmp_path, 40)
    text = CalibrationSettings(calibration="glue/rte", samples=8, seqlen=64, data_dir=tmp_path)
    settings = CompressSettings(
        model=ModelSettings(model=str(tmp_path / "bert")),
        calibration=text,
        group_size=16,
        target="3bit",
        out=tmp_path / "out",
        refine=2,
        metric="taylor",
    )
    inputs = load_inputs(settings, recorder())
    assert all("token_type_ids" in batch for batch in inputs.calibration.batches)
    assert all("token_type_ids" in batch for batch in inputs.held_out.judge)
    outcome = compress(settings, recorder())
    assert outcome.artifact is not None
    manifest = outcome.artifact.manifest
    assert manifest["calibration"]["pairs"] is True
    assert set(manifest["sample"]["inputs"]) == {"input_ids", "attention_mask"}
    assert "pairs of sentences" in (tmp_path / "out" / "report.md").read_text()


def test_a_language_model_is_compressed_on_documents_apart(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model("llama"), tmp_path / "llama")
    tiny_tokenizer(causal=True, bos=True).save_pretrained(tmp_path / "llama")
    words = " ".join(SENTENCES).split()
    documents = [f"{i} " + " ".join(words[: 8 + 2 * i]) for i in range(24)]
    (tmp_path / "a.txt").write_text("\n".join(documents))
    text = CalibrationSettings(
        calibration=str(tmp_path / "a.txt"), samples=12, seqlen=48, documents="apart", batch_size=4
    )
    settings = CompressSettings(
        model=ModelSettings(model=str(tmp_path / "llama")),
        calibration=text,
        group_size=16,
        target="3bit",
        out=tmp_path / "out",
        refine=2,
        metric="taylor-quantized",
    )
    inputs = load_inputs(settings, recorder())
    lengths = {batch["input_ids"].shape[1] for batch in inputs.calibration.batches}
    assert len(lengths) > 1
    record = open_artifact(compress(settings, recorder()).out).calibration
    assert (record.documents, record.bos, record.pairs) == ("apart", True, False)
