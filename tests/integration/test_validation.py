"""`analyze --validate` on tiny models: every number against a slow truth computed apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cptq.calibration.holdout import count_part_rows
from cptq.calibration.tokens import build_calibration
from cptq.checkpoint.loader import load_model
from cptq.checkpoint.weights import set_weight
from cptq.compression.blockwise import compress_model
from cptq.config import AnalyzeSettings, CalibrationSettings, ModelSettings
from cptq.errors import CalibrationError
from cptq.pipeline import analyze
from cptq.sensitivity.rounding import compute_rounding_error
from cptq.types import Budget, Candidate, Event, Notice, Plan, Validation
from tests.conftest import TinyModel
from tests.quick import keep_quick

pytestmark = pytest.mark.usefixtures("short_manual")
CALIBRATION = CalibrationSettings(calibration="pydoc", samples=4, seqlen=64, batch_size=2)


def quiet(_event: Event) -> None: ...


def validated(model: Path, out: Path, **more: Any) -> Validation:
    wanted: dict[str, Any] = {
        "metrics": ("output", "kl"), "pairs": 12, "targets": ("2.5bit", "4bit"), "group_size": 16,
        "bits": (2, 3, 4, 16), "scales": "16bit",
        "calibration": CALIBRATION, "validate": True, "compressor": "nearest",
    }  # fmt: skip
    settings = AnalyzeSettings(model=ModelSettings(model=str(model)), out=out, **wanted | more)
    found = analyze(settings, quiet).summary.validation
    assert found is not None
    return found


def judged(model: Path) -> tuple[Any, list[torch.Tensor]]:
    """The model, and the windows that judge, drawn as the command draws them."""
    settings = ModelSettings(model=str(model))
    loaded = load_model(settings, quiet)
    calibration = build_calibration(
        loaded, CALIBRATION, settings, quiet, held_out=count_part_rows(loaded, CALIBRATION.seqlen)
    )
    return loaded, [row["input_ids"] for row in calibration.held_out]


@torch.no_grad()
def slow_divergence(dense: Any, other: Any, rows: list[torch.Tensor]) -> float:
    """KL(dense || other) per token, float64, one window at a time."""
    total, tokens = 0.0, 0
    for ids in rows:
        p = dense(ids).logits[:, 1::2].double().log_softmax(-1)  # every second position judges
        q = other(ids).logits[:, 1::2].double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
        tokens += p.shape[1]
    return total / tokens


@pytest.fixture(scope="module")
def llama_validation(
    tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Validation]:
    model, out = tiny_model("llama"), tmp_path_factory.mktemp("valid") / "analysis"
    return model, out, validated(model, out)


def test_truths_are_those_of_the_model_with_one_unit_changed(
    llama_validation: tuple[Path, Path, Validation],
) -> None:
    path, _, found = llama_validation
    dense, rows = judged(path)
    assert found.judge_tokens == sum(ids.numel() for ids in rows)
    for pair in found.pairs[::5]:
        changed = load_model(ModelSettings(model=str(path)), quiet)
        unit = next(unit for unit in changed.units if unit.name == pair.unit)
        for spec in unit.layers:
            W_OI = changed.linear(spec.name).weight.detach()
            set_weight(
                changed.linear(spec.name), W_OI - compute_rounding_error(W_OI, spec, pair.candidate)
            )
        assert pair.truth == pytest.approx(
            slow_divergence(dense.module, changed.module, rows), rel=1e-3
        )


def test_plans_are_judged_as_the_compressor_carries_them_out(
    llama_validation: tuple[Path, Path, Validation],
) -> None:
    path, _, found = llama_validation
    settings = ModelSettings(model=str(path))
    dense, rows = judged(path)
    for trial in (found.trials[0], found.trials[-1]):
        changed = load_model(settings, quiet)
        calibration = build_calibration(changed, CALIBRATION, settings, quiet)
        plan = Plan(
            model_fingerprint=changed.fingerprint, budget=Budget(limit_bytes=0, asked="x"),
            allocator="x", metric=None, table_digest=None, choices=trial.choices,
            predicted_bytes=0, predicted_loss=None,
        )  # fmt: skip
        compress_model(changed, calibration, plan, compressor="nearest", emit=quiet)
        assert trial.divergence == pytest.approx(
            slow_divergence(dense.module, changed.module, rows), rel=1e-3
        )
        assert trial.file_bytes <= trial.limit_bytes


def test_every_metric_and_target_has_its_plan_and_the_blind_one_is_uniform(
    llama_validation: tuple[Path, Path, Validation],
) -> None:
    found = llama_validation[2]
    assert [(t.target, t.name) for t in found.trials] == [
        (target, name)
        for target in ("2.5bit", "4bit")
        for name in ("even", "output, knapsack", "kl, knapsack")
    ]
    assert set(found.trials[3].choices.values()) == {Candidate(bits=4, group_size=16)}
    assert {2, 3} <= {c.bits for c in found.trials[0].choices.values()} <= {2, 3, 4}
    assert found.reference == "kl"


def test_scores_stand_beside_truths_and_the_measured_metric_ranks_well(
    llama_validation: tuple[Path, Path, Validation],
) -> None:
    _, out, found = llama_validation
    table = json.loads((out / "sensitivity" / "output.json").read_text())["scores"]
    for pair in found.pairs:
        assert pair.scores["output"] == table[pair.unit][pair.candidate.label]
    assert {row.metric for row in found.agreements} == {"output", "kl"}
    kl = next(row for row in found.agreements if row.metric == "kl")
    assert kl.spearman_pooled.value > 0.9


def test_the_files_say_it_all(llama_validation: tuple[Path, Path, Validation]) -> None:
    _, out, found = llama_validation
    data = json.loads((out / "validation.json").read_text())
    assert data["pairs"][0]["truth"] == found.pairs[0].truth
    assert set(data["texts"]) == {"fit", "choose", "judge"}
    assert json.loads((out / "report.json").read_text())["validation"]["reference"] == "kl"
    html = (out / "report.html").read_text()
    assert html.count("<circle") >= 2 * len(found.pairs)
    for words in ("Scores versus measured divergence", "Regret against the plan of kl"):
        assert words in html
        assert (words in (out / "report.md").read_text()) == words.startswith("Regret")


@pytest.mark.slow
def test_the_model_is_left_as_it_was_and_the_same_seed_gives_the_same(
    llama_validation: tuple[Path, Path, Validation], tmp_path: Path
) -> None:
    path, _, found = llama_validation
    again = validated(path, tmp_path / "again")
    assert (again.pairs, again.trials) == (found.pairs, found.trials)


@pytest.mark.parametrize("arch", keep_quick(("bert", "mpnet"), "bert"))
def test_sentences_are_judged_whole(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    monkeypatch.setattr("cptq.calibration.holdout.SENTENCES", 40)
    found = validated(
        tiny_model(arch), tmp_path / "a", compressor="gptq", metrics=("output",), targets=("3bit",)
    )
    assert len(found.trials) == 2
    assert found.compressor == "gptq"
    assert found.reference is None
    assert all(pair.truth >= 0 for pair in found.pairs)


# text that is kept apart


def test_text_kept_apart_changes_nothing_about_what_calibrates(tiny_model: TinyModel) -> None:
    settings = ModelSettings(model=str(tiny_model("llama")))
    model = load_model(settings, quiet)
    alone = build_calibration(model, CALIBRATION, settings, quiet)
    beside = build_calibration(model, CALIBRATION, settings, quiet, held_out=16)
    assert alone.record == beside.record
    seen = {tuple(row.tolist()) for batch in beside.batches for row in batch["input_ids"]}
    kept = {tuple(row["input_ids"][0].tolist()) for row in beside.held_out}
    assert len(kept) == 16
    assert not seen & kept


def test_where_text_is_short_some_of_it_is_kept_and_that_is_said(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("\n".join(f"Line {k} tells of the number {k * k}." for k in range(40)))
    settings = ModelSettings(model=str(tiny_model("llama")))
    model = load_model(settings, quiet)
    short = CalibrationSettings(calibration=str(text), samples=1000, seqlen=32)
    heard: list[Event] = []
    whole = build_calibration(model, short, settings, quiet)
    apart = build_calibration(model, short, settings, heard.append, held_out=16)
    assert 0 < len(apart.held_out) <= 16
    assert apart.record.samples + len(apart.held_out) == whole.record.samples
    assert [e.subject for e in heard if isinstance(e, Notice)] == ["--samples", "--samples"]
    # a check that nobody asked for takes nothing from what calibrates
    polite = build_calibration(model, short, settings, quiet, held_out=16, reserve=False)
    assert (polite.record, polite.held_out) == (whole.record, [])


def test_one_sample_cannot_both_calibrate_and_judge(tiny_model: TinyModel, tmp_path: Path) -> None:
    text = tmp_path / "tiny.txt"
    text.write_text("A few words that make one short window and no second one.")
    settings = ModelSettings(model=str(tiny_model("llama")))
    model = load_model(settings, quiet)
    short = CalibrationSettings(calibration=str(text), samples=4, seqlen=8)
    windows = build_calibration(model, short, settings, quiet).record.tokens // 8
    one = CalibrationSettings(calibration=str(text), samples=4, seqlen=8 * windows)
    with pytest.raises(CalibrationError, match="none is left to judge with"):
        build_calibration(model, one, settings, quiet, held_out=16)
