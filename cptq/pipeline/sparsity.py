"""Carry out `analyze --sparsity-analysis`: {name of a table: its content}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cptq.calibration.divergence_from_dense import DivergenceFromDense
from cptq.calibration.holdout import split_parts
from cptq.calibration.objective import choose_objective
from cptq.calibration.samples import take_batches
from cptq.calibration.tokens import Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.sensitivity.sparsity.cett import measure_cett
from cptq.sensitivity.sparsity.essential import measure_essential
from cptq.sensitivity.sparsity.lazy_neurons import (
    NEAR,
    count_zeros,
    draw_random_text,
    list_last_linears,
)
from cptq.sensitivity.sparsity.outliers import OUTLIER_TIMES, measure_outlier_ratios
from cptq.sensitivity.sparsity.weights import measure_inequality
from cptq.types import Emit, Notice

#: calibration tokens on which activations are counted
COUNTED_TOKENS = 4096
_FLAG = "--sparsity-analysis"


def analyze_sparsity(
    model: LoadedModel, calibration: Calibration, seed: int, emit: Emit
) -> Mapping[str, Any]:
    """Measure all tables; what a model has no layers for is left out, with a notice."""
    held_out = split_parts(model, calibration.held_out, 1)[0]
    objective = choose_objective(model.kind, model.config)
    divergence = DivergenceFromDense(model, held_out, objective, emit)
    tables: dict[str, Any] = {
        "weight-inequality": {
            "units": measure_inequality(model),
            "outlier_times": OUTLIER_TIMES,
            "outlier_ratio": {
                str(block): ratio
                for block, ratio in measure_outlier_ratios(model, calibration, seed, emit).items()
            },
        },
        "essential-sparsity": measure_essential(model, divergence, emit),
    }
    if not list_last_linears(model):
        message = "no feed-forward layer is known here: lazy neurons and CETT are left out"
        emit(Notice(kind="skipped", subject=_FLAG, message=message))
        return tables
    some = take_batches(calibration.batches, COUNTED_TOKENS)
    vocabulary = int(model.config.get_text_config().vocab_size)
    tables["lazy-neurons"] = {
        "near": NEAR,
        "text": count_zeros(model, some),
        "random_tokens": count_zeros(model, draw_random_text(some, vocabulary, seed)),
    }
    if model.kind != "causal-lm":
        message = "CETT-PPL needs a causal language model: left out"
        emit(Notice(kind="skipped", subject=_FLAG, message=message))
        return tables
    tables["cett"] = measure_cett(model, some, held_out, emit)
    return tables
