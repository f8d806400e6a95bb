"""What a model lost, against plain loops over its outputs."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch import Tensor

from cptq.calibration.batches import Batch, split_held_out
from cptq.calibration.depth import DepthError, take_rows
from cptq.calibration.divergence_from_dense import JUDGED_EVERY, DivergenceFromDense
from cptq.calibration.guard import measure_guard
from cptq.calibration.objective import choose_objective
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight, replace_weight
from cptq.types import GuardMeasure
from tests.conftest import TinyModel
from tests.reference import guard as truth
from tests.reference.sensitivity import loaded, random_calibration


def change(model: LoadedModel, stack: ExitStack) -> None:
    """Make all layers of the units smaller."""
    for unit in model.units:
        for spec in unit.layers:
            module = model.linear(spec.name)
            stack.enter_context(replace_weight(module, get_weight(module) * 0.7))


def measure(model: LoadedModel) -> tuple[dict[str, GuardMeasure], tuple[float, ...], list[Batch]]:
    rows = split_held_out(random_calibration(model).batches, model.kind, 200).held_out
    objective = choose_objective(model.kind, model.config)
    divergence = DivergenceFromDense(model, rows, objective, units=False)
    depth = DepthError(model, rows)
    with ExitStack() as stack:
        change(model, stack)
        found = measure_guard(divergence, depth, source="text")
    assert found.samples == sum(len(row["input_ids"]) for row in rows)
    return {measure.name: measure for measure in found.measures}, found.depth, list(rows)


def run_both(model: LoadedModel, row: Batch) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), ExitStack() as stack:
        dense = model.module(**row)
        change(model, stack)
        own = model.module(**row)
    pick = "logits" if hasattr(dense, "logits") else "last_hidden_state"
    return getattr(dense, pick).double(), getattr(own, pick).double()


def check_mean(found: GuardMeasure, windows: list[list[float]]) -> None:
    mean, error, reach = truth.estimate_mean(windows)
    assert found.value == pytest.approx(mean, rel=1e-4)
    assert found.stderr == pytest.approx(error, rel=1e-3)
    assert found.interval is not None
    assert found.interval[1] == pytest.approx(mean + reach, rel=1e-3)


def test_a_language_model_equals_plain_loops(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    measures, _, rows = measure(model)
    kl, same, own_nll, dense_nll = ([], [], [], [])  # type: ignore[var-annotated]
    for row in rows:
        dense_BTV, own_BTV = run_both(model, row)
        length = row["input_ids"].shape[1]
        every = JUDGED_EVERY if length >= 8 * JUDGED_EVERY else 1
        for b in range(len(dense_BTV)):
            places = [t for t in range(every - 1, length, every) if row["attention_mask"][b, t]]
            pairs = [(dense_BTV[b, t].tolist(), own_BTV[b, t].tolist()) for t in places]
            kl.append([truth.compute_kl(*pair) for pair in pairs])
            same.append([float(np.argmax(x) == np.argmax(y)) for x, y in pairs])
            told = [t for t in places if t + 1 < length and row["attention_mask"][b, t + 1]]
            labels = {t: int(row["input_ids"][b, t + 1]) for t in told}
            dense_nll.append(
                [-truth.log_softmax(dense_BTV[b, t].tolist())[labels[t]] for t in told]
            )
            own_nll.append([-truth.log_softmax(own_BTV[b, t].tolist())[labels[t]] for t in told])
    check_mean(measures["KL"], kl)
    check_mean(measures["top-1 agreement"], same)
    found = measures["perplexity"]
    own, dense = (np.exp(truth.estimate_mean(rows)[0]) for rows in (own_nll, dense_nll))
    assert found.value == pytest.approx(own, rel=1e-5)
    assert found.dense == pytest.approx(dense, rel=1e-5)
    gaps = [
        [own * n - dense * m for n, m in zip(*pair, strict=True)]
        for pair in zip(own_nll, dense_nll, strict=True)
    ]
    assert found.interval is not None
    assert found.interval[1] - (own - dense) == pytest.approx(
        truth.estimate_mean(gaps)[2], rel=1e-3, abs=1e-6
    )


def test_an_encoder_has_a_cosine_distance(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("bert-encoder"))
    measures, _, rows = measure(model)
    assert set(measures) == {"cosine distance"}
    gaps = []
    for row in rows:
        dense_BTD, own_BTD = run_both(model, row)
        mask_BT1 = row["attention_mask"].unsqueeze(-1)
        a, b = ((x * mask_BT1).sum(1) for x in (dense_BTD, own_BTD))
        gaps += [[float(1 - gap)] for gap in torch.cosine_similarity(a, b)]
    check_mean(measures["cosine distance"], gaps)


def test_a_classifier_has_no_perplexity(tiny_model: TinyModel) -> None:
    measures, depth, _ = measure(loaded(tiny_model("bert")))
    assert set(measures) == {"KL", "top-1 agreement"}
    assert len(depth) == 3


def test_the_depth_error_is_that_of_the_hidden_states(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    _, depth, rows = measure(model)
    (row,) = take_rows(rows)
    seen: list[np.ndarray] = []
    mask = row["attention_mask"].bool()

    def take(module: object, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        if not len(seen) % (len(model.blocks) + 1):
            seen.append(args[0][mask].numpy())
        seen.append((output[0] if isinstance(output, tuple) else output)[mask].numpy())

    handles = [block.register_forward_hook(take) for block in model.blocks]
    run_both(model, row)
    for handle in handles:
        handle.remove()
    half = len(seen) // 2
    assert depth == pytest.approx(truth.compute_depth(seen[:half], seen[half:]), rel=1e-4)
    assert depth[0] == 0.0
    assert depth[-1] > 0
