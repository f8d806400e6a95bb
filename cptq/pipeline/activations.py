"""`compress --activation-sparsity`: which linears get rules, and rules fitted to the text.

Rules are fitted to the compressed model on the calibration text, and kept as a step of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from cptq.activation_sparsity import METHODS
from cptq.activation_sparsity.walk import (
    STAGE,
    TOKENS,
    apply_rules,
    cut_batches,
    find_function,
    fit_rules,
)
from cptq.calibration.batches import Batch, count_tokens
from cptq.checkpoint.model import LoadedModel
from cptq.config import parse_activation_sparsity
from cptq.pipeline.recorder import Recorder
from cptq.pipeline.run_directory import RunDirectory
from cptq.types import ActivationRecord, ActivationRule, CompressedLayer, LayerSpec, Notice

_FLAG = "--activation-sparsity"


def list_rules(option: str | None, model: LoadedModel) -> dict[str, str]:
    """Return {linear: label of its rule} for the linears of the blocks; empty without the option.

    Raises:
        UsageError: the method is none for this model.
    """
    if option is None:
        return {}
    method, _ = parse_activation_sparsity(option)
    return dict(METHODS.get(method).list_rules(_list_linears(model), find_function(model.config)))


def _list_linears(model: LoadedModel) -> list[LayerSpec]:
    return [
        spec
        for unit in model.units
        if unit.block is not None
        for spec in unit.layers
        if not spec.expert
    ]


def add_rules(
    option: str | None,
    model: LoadedModel,
    layers: Sequence[CompressedLayer],
    labels: Mapping[str, str],
    batches: Sequence[Batch],
    run: RunDirectory,
    recorder: Recorder,
) -> tuple[tuple[CompressedLayer, ...], ActivationRecord | None]:
    """Return compressed layers with the rules that the option asks for, and the record of it.

    Args:
        option: the value of --activation-sparsity.
        model: it computes with the compressed weights.
        layers: all compressed layers.
        labels: what `list_rules` gave; those of layers that the plan keeps dense are left out.
        batches: calibration text.
        run: keeps the rules.
        recorder: receives progress and notices.
    """
    if option is None:
        return tuple(layers), None
    method, share = parse_activation_sparsity(option)
    packed = {layer.spec.name for layer in layers}
    taken = {name: label for name, label in labels.items() if name in packed}

    def make() -> tuple[dict[str, ActivationRule], dict[str, float]]:
        _report_left_out(len(labels) - len(taken), recorder)
        return fit_rules(
            model, batches, METHODS.get(method), 1.0 if share is None else share, taken, recorder
        )

    with recorder.stage(STAGE):
        rules, reached = run.keep(STAGE, make)
    record = ActivationRecord(
        method=method,
        share=share,
        tokens=count_tokens(cut_batches(batches, TOKENS)),
        rules={name: rule.label for name, rule in rules.items()},
        reached=reached,
        mean=_average(reached, model.layers),
    )
    recorder(Notice(kind="info", subject=_FLAG, message=_describe(record)))
    return tuple(replace(layer, rule=rules.get(layer.spec.name)) for layer in layers), record


def attach_rules(
    model: LoadedModel, layers: Sequence[CompressedLayer]
) -> AbstractContextManager[None]:
    """Have the model in memory drop what the rules of its layers say, inside a with-block."""
    return apply_rules(model, {x.spec.name: x.rule for x in layers if x.rule is not None})


def _report_left_out(count: int, recorder: Recorder) -> None:
    if count:
        message = f"{count} linears that the plan keeps at 16 bits see all their inputs"
        recorder(Notice(kind="info", subject=_FLAG, message=message))


def _average(reached: Mapping[str, float], layers: Sequence[LayerSpec]) -> float:
    """Return the mean of shares, weighted by weights."""
    numel = {spec.name: spec.numel for spec in layers if spec.name in reached}
    return sum(reached[name] * n for name, n in numel.items()) / max(1, sum(numel.values()))


def _describe(record: ActivationRecord) -> str:
    return (
        f"{record.label} drops {record.mean:.1%} of the products of {len(record.reached)} linears "
        f"on {record.tokens:,} calibration tokens"
    )
