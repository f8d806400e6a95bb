"""The driver: every metric on every kind of model, sharing, errors, determinism."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cptq.calibration.probe import Probe
from cptq.calibration.slices import split_held_out
from cptq.checkpoint.weights import get_weight
from cptq.errors import CalibrationError, ModelError, UnknownNameError, UsageError
from cptq.numerics.masks import magnitude_pruned, relative_error
from cptq.sensitivity import METRICS
from cptq.sensitivity import measure as driver
from cptq.sensitivity.measure import measure
from cptq.sensitivity.pruning import SPARSITIES
from cptq.sensitivity.rounding import rounding_error
from cptq.types import Candidate, Notice, Progress, SensitivityTable
from tests.reference.sensitivity import loaded, random_calibration

TinyModel = Callable[..., Path]
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


@pytest.mark.parametrize("arch", KINDS)
def test_every_metric_scores_every_unit(arch: str, tiny_model: TinyModel) -> None:
    path = tiny_model(arch)
    units = loaded(path).units
    for name, table in tables(path, rows=20).items():
        assert list(table.scores) == [unit.name for unit in units]
        assert set(table.per_block) == {0, 1}
        assert table.seconds > 0
        assert table.tokens > 0
        for unit in units:
            row = table.scores[unit.name]
            assert row[DENSE] == 0.0
            assert row[CANDIDATES[0]] > row[CANDIDATES[1]] > row[CANDIDATES[2]] >= 0, (name, unit)
        again = SensitivityTable.from_dict(json.loads(json.dumps(table.to_dict())))
        assert again.digest == table.digest


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


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_pruning_equals_its_definition(arch: str, tiny_model: TinyModel) -> None:
    model = loaded(tiny_model(arch))
    calibration = random_calibration(model)
    table = measure(
        model,
        calibration,
        metrics=["pruning"],
        candidates=CANDIDATES,
        seed=0,
        emit=lambda event: None,
    )["pruning"]
    held_out = split_held_out(calibration.batches, model.kind, 1024).held_out
    probe = Probe(model, held_out, driver.objective_for(model.kind, model.config))
    unit = next(unit for unit in model.units if len(unit.layers) == 1)
    spec = unit.layers[0]
    W = get_weight(model.linear(spec.name)).clone()
    alphas = []
    for sparsity in SPARSITIES:
        pruned = magnitude_pruned(W, sparsity)
        alphas.append(
            probe.divergence(unit, {spec.name: pruned}) / relative_error([W - pruned], [W])
        )
    alpha = sum(alphas) / len(alphas)
    assert table.per_unit[unit.name] == pytest.approx(alpha)
    for candidate in CANDIDATES:
        t2 = relative_error([rounding_error(W, spec, candidate)], [W])
        assert table.scores[unit.name][candidate] == pytest.approx(alpha * t2)


def test_output_error_agrees_with_the_measured_truth_in_nats(tiny_model: TinyModel) -> None:
    """Sums over units within half of each other: the units and factors are right."""
    measured = tables(tiny_model("llama"), ("output-rtn", "kl"), rows=40)
    sums = [sum(row[CANDIDATES[1]] for row in table.scores.values()) for table in measured.values()]
    assert 0.67 < sums[0] / sums[1] < 1.5


def test_progress_and_times_are_told(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    events: list[object] = []
    measure(
        model,
        random_calibration(model),
        metrics=["output", "kl"],
        candidates=CANDIDATES,
        seed=0,
        emit=events.append,
    )
    stages = [event for event in events if isinstance(event, Progress)]
    assert stages[-1].done == stages[-1].total == len(model.units)
    notices = {event.subject: event.message for event in events if isinstance(event, Notice)}
    assert "shared steps: samples" in notices["seconds of sensitivity"]
    assert "held-out" in notices["sensitivity samples"]


def test_too_few_tokens_for_cca(tiny_model: TinyModel) -> None:
    with pytest.raises(
        CalibrationError, match="at least 640 calibration tokens, there are 256"
    ) as e:
        tables(tiny_model("llama"), ("output", "cca"), rows=4)
    assert "--samples" in str(e.value)


def test_unknown_metrics_name_the_nearest(tiny_model: TinyModel) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'taylor'"):
        tables(tiny_model("llama"), ("tailor",))


@pytest.mark.parametrize(
    "candidate",
    [Candidate(bits=4, symmetric=False), Candidate(bits=4, sparsity=0.5, pattern="2:4")],
)
def test_candidates_without_a_rounding_are_refused(
    candidate: Candidate, tiny_model: TinyModel
) -> None:
    model = loaded(tiny_model("llama"))
    with pytest.raises(UsageError, match="no metric can score"):
        measure(
            model,
            random_calibration(model),
            metrics=["output"],
            candidates=[candidate],
            seed=0,
            emit=lambda event: None,
        )


def test_broken_weights_are_named(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    name = model.units[1].layers[0].name
    get_weight(model.linear(name))[0, 0] = float("nan")
    with pytest.raises(ModelError, match=name):
        measure(
            model,
            random_calibration(model),
            metrics=["output"],
            candidates=CANDIDATES,
            seed=0,
            emit=lambda event: None,
        )


def test_a_model_without_compressible_layers_is_refused(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("gpt2"))
    with pytest.raises(ModelError, match="no layer that can be compressed"):
        measure(
            model,
            random_calibration(model),
            metrics=["output"],
            candidates=CANDIDATES,
            seed=0,
            emit=lambda event: None,
        )


def test_sparse_candidates_lose_their_small_weights(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    spec = model.units[0].layers[0]
    W = get_weight(model.linear(spec.name)).clone()
    sparse = Candidate(bits=8, group_size=16, sparsity=0.5, pattern="unstructured")
    Q = W - rounding_error(W, spec, sparse)
    assert int((Q == 0).sum()) >= W.numel() // 2
    only = replace(sparse, bits=16)
    torch.testing.assert_close(W - rounding_error(W, spec, only), magnitude_pruned(W, 0.5))


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
