"""The driver: every metric on every kind of model, sharing, errors, determinism."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cptq.calibration.batches import choose_held_out_tokens, split_held_out
from cptq.calibration.divergence_from_dense import DivergenceFromDense
from cptq.calibration.objective import choose_objective
from cptq.checkpoint.loader import load_model
from cptq.checkpoint.memory import BASE, Memory
from cptq.checkpoint.weights import get_weight
from cptq.config import ModelSettings
from cptq.errors import CalibrationError, ModelError, UnknownNameError, UsageError
from cptq.numerics.grid import fit_grid
from cptq.numerics.masks import prune_by_magnitude
from cptq.sensitivity import METRICS, SLOW, list_default_metrics
from cptq.sensitivity.kurtosis import compute_kurtosis
from cptq.sensitivity.measure import measure
from cptq.sensitivity.metric import Memo
from cptq.sensitivity.rounding import NearestRounding, compute_rounding_error
from cptq.types import Candidate, Notice, Progress, SensitivityTable, Unit
from tests.conftest import TinyModel
from tests.quick import keep_quick
from tests.reference.sensitivity import loaded, random_calibration
from tests.unit.checkpoint.made import edit_weights
from tests.unit.sensitivity.conftest import Score

CANDIDATES = tuple(Candidate(bits=bits, group_size=16) for bits in (2, 4, 8))
DENSE = Candidate(bits=16)
KINDS = ("llama", "opt", "bert", "bert-encoder", "bert-mlm")


def tables(
    path: Path, metrics: tuple[str, ...] = tuple(METRICS), *, seed: int = 0, **options: int
) -> dict[str, SensitivityTable]:
    model = loaded(path)
    return measure(
        model,
        random_calibration(model, **options),
        metrics=metrics,
        candidates=(*CANDIDATES, DENSE),
        seed=seed,
        emit=lambda event: None,
    )


@pytest.mark.parametrize("arch", keep_quick(KINDS, "llama", "bert", "bert-encoder"))
def test_every_metric_scores_every_unit(arch: str, tiny_model: TinyModel) -> None:
    path = tiny_model(arch)
    units = loaded(path).units
    for name, table in tables(path, rows=20).items():
        assert list(table.scores) == [unit.name for unit in units]
        assert set(table.per_block) == {0, 1}
        assert table.seconds > 0
        assert (table.tokens > 0) == METRICS.get(name).needs.text
        for unit in units:
            row = table.scores[unit.name]
            assert row[DENSE] == 0.0
            few, some, many = (row[candidate] for candidate in CANDIDATES)
            signed = name.startswith("taylor-")  # what others make up for may cost less than 0
            assert few > some > many >= 0 or (signed and min(row.values()) >= 0), (name, unit)
        again = SensitivityTable.from_dict(json.loads(json.dumps(table.to_dict())))
        assert again.digest == table.digest


@pytest.mark.slow
def test_a_table_does_not_depend_on_its_company(tiny_model: TinyModel) -> None:
    path = tiny_model("llama")
    together = tables(path, rows=20)
    for name in METRICS:
        alone = tables(path, (name,), rows=20)[name]
        assert alone.scores == together[name].scores
        assert alone.digest == together[name].digest


def test_the_seed_decides(tiny_model: TinyModel) -> None:
    path = tiny_model("llama")
    first, other = (tables(path, ("output",), seed=seed)["output"] for seed in (0, 1))
    assert first.scores != other.scores


def test_output_error_agrees_with_the_measured_truth_in_nats(tiny_model: TinyModel) -> None:
    """Sums over units within half of each other: the units and factors are right."""
    measured = tables(tiny_model("llama"), ("output-rtn", "kl"), rows=40)
    sums = [sum(row[CANDIDATES[1]] for row in table.scores.values()) for table in measured.values()]
    assert 0.67 < sums[0] / sums[1] < 1.5


def test_progress_and_shared_rows_are_reported(tiny_model: TinyModel, score: Score) -> None:
    model = loaded(tiny_model("llama"))
    events: list[object] = []
    score(model, ["output", "kl"], CANDIDATES, emit=events.append)
    stages = [event for event in events if isinstance(event, Progress)]
    assert stages[-1].done == stages[-1].total == len(model.units)
    notices = {event.subject: event.message for event in events if isinstance(event, Notice)}
    assert "held-out" in notices["sensitivity samples"]


def test_all_is_every_metric_but_the_slow_ones() -> None:
    assert [name for name in METRICS if name not in list_default_metrics()] == list(SLOW) == ["kl"]


def test_shared_values_are_made_once_also_within_one_another() -> None:
    memo = Memo()
    calls: list[str] = []

    def inner() -> None:
        calls.append("inner")

    def outer() -> str:
        calls.append("outer")
        memo.get("inner", inner)
        return "value"

    assert [memo.get("outer", outer) for _ in range(3)] == ["value"] * 3
    memo.get("inner", inner)  # None is a value, too
    assert calls == ["outer", "inner"]


def test_too_few_tokens_for_cca(tiny_model: TinyModel) -> None:
    with pytest.raises(CalibrationError, match=r"'cca'.*\b160\b.*\b128\b") as e:
        tables(tiny_model("llama"), ("output", "cca"), rows=2)
    assert "--samples" in str(e.value)


def test_unknown_metrics_name_the_nearest(tiny_model: TinyModel) -> None:
    with pytest.raises(UnknownNameError, match="'taylor'"):
        tables(tiny_model("llama"), ("tailor",))


def test_candidates_without_a_rounding_are_refused(tiny_model: TinyModel, score: Score) -> None:
    candidate = Candidate(bits=4, sparsity=0.9, pattern="some")
    model = loaded(tiny_model("llama"))
    with pytest.raises(UsageError, match="'some'"):
        score(model, ["output"], [candidate])


def test_a_grid_is_fitted_once_and_kept_until_its_unit_is_scored(
    tiny_model: TinyModel, score: Score, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes on the path, two metrics that round, and progress from unit to unit."""
    fitted: list[torch.Size] = []
    made: list[NearestRounding] = []
    kept: list[int] = []

    def fit(W_OI: torch.Tensor, *rest: Any, **options: Any) -> Any:
        fitted.append(W_OI.shape)
        return fit_grid(W_OI, *rest, **options)

    class Watched(NearestRounding):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    def listen(event: object) -> None:
        if isinstance(event, Progress) and event.stage == "sensitivity":
            kept.append(len(made[0]._grids))

    monkeypatch.setattr("cptq.sensitivity.rounding.fit_grid", fit)
    monkeypatch.setattr("cptq.sensitivity.prepare.NearestRounding", Watched)
    model = loaded(tiny_model("llama"))
    score(model, ("output", "taylor", "taylor-integrated"), CANDIDATES, emit=listen)
    layers = sum(len(unit.layers) for unit in model.units)
    assert len(fitted) == layers * len(CANDIDATES) == kept[0]
    assert sorted(kept, reverse=True) == kept
    assert kept[-1] == 0


def test_a_model_without_compressible_layers_is_refused(
    tiny_model: TinyModel, score: Score
) -> None:
    model = loaded(tiny_model("gpt2"))
    with pytest.raises(ModelError, match=re.escape(model.source)):
        score(model, ["output"], CANDIDATES)


def test_sparse_candidates_lose_their_small_weights(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    spec = model.units[0].layers[0]
    W = get_weight(model.linear(spec.name)).clone()
    sparse = Candidate(bits=8, group_size=16, sparsity=0.5, pattern="unstructured")
    Q = W - compute_rounding_error(W, spec, sparse)
    assert int((Q == 0).sum()) >= W.numel() // 2
    only = replace(sparse, bits=16)
    torch.testing.assert_close(
        W - compute_rounding_error(W, spec, only), prune_by_magnitude(W, 0.5)
    )


@pytest.mark.slow
def test_metrics_rank_like_the_truth_on_a_trained_model(stories: Path) -> None:
    """On text that the model itself writes; cca is not among those that rank well."""
    from scipy.stats import spearmanr

    model = loaded(stories)
    torch.manual_seed(0)
    start = torch.ones(64, 1, dtype=torch.long)
    with torch.no_grad():
        ids = model.module.generate(
            start, attention_mask=start, max_new_tokens=127, min_new_tokens=127, do_sample=True
        )
    calibration = replace(
        random_calibration(model),
        batches=[
            {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)
        ],
    )
    candidates = [Candidate(bits=bits, group_size=64) for bits in (2, 3, 4, 6)]
    measured = measure(
        model,
        calibration,
        metrics=["output", "output-rtn", "taylor", "pruning", "kl"],
        candidates=candidates,
        seed=0,
        emit=lambda event: None,
    )
    for name, least in {"output": 0.8, "output-rtn": 0.85, "taylor": 0.85, "pruning": 0.7}.items():
        for candidate in candidates:
            pair = [
                [measured[metric].scores[unit.name][candidate] for unit in model.units]
                for metric in (name, "kl")
            ]
            assert spearmanr(*pair).statistic > least, (name, candidate.label)


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_has_the_divergence_that_it_causes(
    tiny_model: TinyModel, tied: bool
) -> None:
    """Of losses what was measured, of `cca` that of an average unit, of weights their own."""
    model = loaded(tiny_model("llama", tied=tied))
    calibration = random_calibration(model, rows=20)
    rows = {unit.name: (*CANDIDATES, DENSE) for unit in model.vocabulary}

    def compress(unit: Unit, candidate: Candidate) -> dict[str, torch.Tensor]:
        (spec,) = unit.layers
        W_OI = get_weight(model.linear(spec.name)).float()
        return {spec.name: W_OI - compute_rounding_error(W_OI, spec, candidate)}

    found = measure(
        model,
        calibration,
        metrics=("output", "taylor", "pruning", "kurtosis", "cca"),
        candidates=(*CANDIDATES, DENSE),
        seed=0,
        emit=lambda event: None,
        vocabulary=rows,
        compress_outer=compress,
    )
    split = split_held_out(
        calibration.batches, model.kind, choose_held_out_tokens(model.parameters, True)
    )
    judge = DivergenceFromDense(
        model, split.held_out, choose_objective(model.kind, model.config), units=False
    )
    weights = sum(unit.numel for unit in model.units)
    for unit in model.vocabulary:
        (spec,) = unit.layers
        W_OI = get_weight(model.linear(spec.name)).float()
        for candidate in CANDIDATES:
            truth = judge.measure_layers(compress(unit, candidate))
            for metric in ("output", "taylor", "pruning"):
                assert found[metric].scores[unit.name][candidate] == pytest.approx(truth, rel=1e-5)
            dW_OI = compute_rounding_error(W_OI, spec, candidate)
            lost = float(dW_OI.square().sum() / W_OI.square().sum())
            own = compute_kurtosis(W_OI)
            mean = sum(found["cca"].per_unit.values()) / len(found["cca"].per_unit)
            for metric, slope in (("kurtosis", own), ("cca", mean)):
                expected = slope * unit.numel / weights * lost
                # from some rows of the matrix
                score = found[metric].scores[unit.name][candidate]
                assert score == pytest.approx(expected, rel=0.1)
        for table in found.values():
            assert table.scores[unit.name][DENSE] == 0
            assert unit.name not in table.per_unit


@pytest.mark.parametrize(
    "arch",
    [
        "llama",
        *(
            pytest.param(arch, marks=pytest.mark.slow)
            for arch in ("opt", "bert", "bert-encoder", "qwen3_moe")
        ),
    ],
)
def test_scores_are_the_same_with_one_block_in_memory(
    arch: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Also where the checkpoint stores a narrower type than the model computes in."""
    path = Path(shutil.copytree(tiny_model(arch), tmp_path / "m"))
    edit_weights(path, lambda tensors: tensors.update({n: t.half() for n, t in tensors.items()}))
    metrics, found = [*list_default_metrics(), *SLOW], []
    for memory in (None, Memory(total=BASE)):
        settings = ModelSettings(model=str(path), device="cpu")
        model = load_model(settings, lambda _: None, experts=True, memory=memory)
        found.append(
            measure(
                model,
                random_calibration(model),
                metrics=metrics,
                candidates=(*CANDIDATES, DENSE),
                seed=0,
                emit=lambda event: None,
            )
        )
    for name, table in found[0].items():
        assert table.scores == found[1][name].scores, name
        assert table.per_unit == found[1][name].per_unit, name
        assert any(score > 0 for row in table.scores.values() for score in row.values())
