"""Compress a model block by block, each on the activations of what is already compressed.

For every block: run it on the hidden states that the compressed blocks before it produce, sum each
linear's Hessian on the way, compress its linears, run it again with the new weights. So a block
sees the errors of those before it (GPTQ, arXiv 2210.17323, section 4).

A compressor that corrects (`CORRECTING`) goes further: units are taken one after the other also
inside a block, and each is compressed towards the weight that makes up for part of the errors
before it, for which the dense model's hidden states travel along (`compression.streams`).

The vocabulary frames the blocks: an embedding goes first, an output head last
(`compression.vocabulary`).

Memory: one hidden state per token, and the Hessians of one block; where errors are corrected two
states, the dense inputs of a block, what waiting passes hold and the moments of one unit. Cost: two
forward passes over the blocks, one for the moments, to the last linear's input, and one with the
new weights; with correction one of the dense model and one of the compressed, and twice the sums
(`compression.streams`). Held-out text, on which output errors are measured, takes the compressed
way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from cptq.calibration.batches import Batch
from cptq.calibration.tokens import Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.compression import COMPRESSORS, CORRECTING, WITHOUT_ACTIVATIONS
from cptq.compression.layer import compress_module
from cptq.compression.streams import Moments, Stream, embed_batches
from cptq.compression.vocabulary import choose_compressor, is_head
from cptq.layouts import Layout
from cptq.layouts.pack_quantized import PACK_QUANTIZED
from cptq.types import CompressedLayer, Emit, Notice, Plan, Progress, Unit


@torch.no_grad()
def compress_model(
    model: LoadedModel,
    calibration: Calibration,
    plan: Plan,
    *,
    compressor: str,
    float16_scales: bool = False,
    layout: Layout = PACK_QUANTIZED,
    held_out: Sequence[Batch] = (),
    emit: Emit,
) -> list[CompressedLayer]:
    """Carry out a plan; afterwards `model.module` computes with the compressed weights.

    `layout` counts the bytes of a layer. `float16_scales` makes every scale one that float16 holds,
    whatever the checkpoint's type. `held_out` are batches that do not calibrate, on which output
    errors are measured; without any, on those that do.

    Returns:
        One `CompressedLayer` for every layer that is not kept dense: embedding, blocks, head.

    Raises:
        CalibrationError: an activation is NaN or infinite, naming the layer.
        UnknownNameError: no such compressor.
    """
    compress = partial(
        compress_module,
        method=COMPRESSORS.get(compressor),
        layout=layout,
        dtype=model.dtype,
        float16_scales=float16_scales,
    )
    corrects = compressor in CORRECTING
    chosen = [
        unit
        for unit in model.vocabulary
        if unit.name in plan.choices and not plan.choices[unit.name].dense
    ]
    embeddings = [unit for unit in chosen if not is_head(unit)]
    embedded = embed_batches(model, calibration.batches) if corrects and embeddings else None
    done = [_compress_outer(model, unit, plan, None, None, compress, emit) for unit in embeddings]
    calibrating = Stream(model, calibration.batches, dense=corrects, embedded=embedded)
    judging = Stream(model, held_out) if held_out else None
    total = len(model.blocks)
    for block in range(total):
        emit(Progress(stage="compress", done=block, total=total, message=f"block {block}"))
        units = [u for u in model.units if u.block == block and not plan.choices[u.name].dense]
        in_order = calibrating.enter_block(block, units)
        stages = _split_stages(units, one_by_one=corrects)
        owns = calibrating.walk(block, stages, in_order=in_order)
        others = judging.walk(block, stages, in_order=in_order) if judging else [{}] * len(stages)
        # strict: asks the walks for one more than there is, so that they go on to the block's end
        for stage, own, other in zip(stages, owns, others, strict=True):
            done += _compress_units(model, stage, plan, own, other, compress, emit)
    for unit in chosen:
        if is_head(unit):
            emit(Progress(stage="compress", done=total, total=total, message=unit.name))
            reads = compressor not in WITHOUT_ACTIVATIONS
            at_head = calibrating.collect_head() if reads else None
            judged = judging.collect_head() if reads and judging else None
            done.append(_compress_outer(model, unit, plan, at_head, judged, compress, emit))
    emit(Progress(stage="compress", done=total, total=total))
    return done


def _split_stages(units: Sequence[Unit], *, one_by_one: bool) -> list[list[Unit]]:
    """Return the units of a block by the pass that collects their moments, in forward order.

    Taken one by one experts still are one stage: there may be hundreds, and each costs a pass.
    """
    if not one_by_one:
        return [list(units)] if units else []
    stages: list[list[Unit]] = []
    for unit in units:
        if stages and unit.layers[0].expert and stages[-1][0].layers[0].expert:
            stages[-1].append(unit)
        else:
            stages.append([unit])
    return stages


def _compress_units(
    model: LoadedModel,
    units: list[Unit],
    plan: Plan,
    moments: Mapping[str, Moments],
    held_out: Mapping[str, Moments],
    compress: Callable[..., CompressedLayer],
    emit: Emit,
) -> list[CompressedLayer]:
    """Compress the layers of some units in place, and report their notes."""
    done = []
    for unit in units:
        for spec in unit.layers:
            module, candidate = model.linear(spec.name), plan.choices[unit.name]
            own, other = moments[unit.name], held_out.get(unit.name)
            done.append(
                compress(
                    module,
                    spec,
                    own.H_II,
                    candidate,
                    cross_II=own.C_II,
                    held_out_II=None if other is None else other.H_II,
                )
            )
            _emit_notes(done[-1], emit)
    return done


def _compress_outer(
    model: LoadedModel,
    unit: Unit,
    plan: Plan,
    own: Moments | None,
    other: Moments | None,
    compress: partial[CompressedLayer],
    emit: Emit,
) -> CompressedLayer:
    """Compress a unit of the vocabulary in place, and report its notes."""
    (spec,) = unit.layers
    layer = compress(
        model.linear(spec.name),
        spec,
        None if own is None else own.H_II,
        plan.choices[unit.name],
        method=choose_compressor(unit, compress.keywords["method"]),
        held_out_II=None if other is None else other.H_II,
    )
    _emit_notes(layer, emit)
    return layer


def _emit_notes(layer: CompressedLayer, emit: Emit) -> None:
    for note in layer.result.notes:
        emit(Notice(kind="fallback", subject=layer.spec.name, message=note))
