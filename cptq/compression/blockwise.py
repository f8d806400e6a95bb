"""Compress a model block by block, each on the activations of what is already compressed.

For every block: run it on the hidden states that the compressed blocks before it produce, sum each
linear's Hessian on the way, compress its linears, run it again with the new weights. So a block
sees the errors of those before it (GPTQ, arXiv 2210.17323, section 4). Memory: one hidden state
per calibration token, and the Hessians of one block. Cost: two forward passes over the blocks, the
first without what follows the last linear's input.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from cptq.calibration.replay import BlockReplay
from cptq.calibration.tokens import Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight, set_weight
from cptq.compression import COMPRESSORS
from cptq.compression.half import in_half
from cptq.compression.problem import Compressor, Solution, layer_problem
from cptq.errors import CalibrationError
from cptq.layouts import Layout
from cptq.layouts.pack_quantized import PACK_QUANTIZED
from cptq.numerics.asymmetric import dequantize_asymmetric
from cptq.numerics.grid import dequantize
from cptq.numerics.hessian import SecondMoment
from cptq.types import (
    Candidate,
    CompressedLayer,
    Emit,
    LayerResult,
    LayerSpec,
    Notice,
    Plan,
    Progress,
    Unit,
)


def compress_model(
    model: LoadedModel,
    calibration: Calibration,
    plan: Plan,
    *,
    compressor: str,
    half_scales: bool = False,
    layout: Layout = PACK_QUANTIZED,
    emit: Emit,
) -> list[CompressedLayer]:
    """Carry out a plan; afterwards `model.module` computes with the compressed weights.

    `layout` counts the bytes of a layer. `half_scales` makes every scale one that float16 holds,
    whatever the checkpoint's type.

    Returns:
        One `CompressedLayer` for every linear that is not kept dense, in forward order.

    Raises:
        CalibrationError: an activation is NaN or infinite, naming the layer.
        UnknownNameError: no such compressor.
    """
    method = COMPRESSORS.get(compressor)
    method = in_half(method) if half_scales else method
    replay = BlockReplay(model, calibration.batches)
    hidden = [replay.embed(i) for i in range(len(calibration.batches))]
    done: list[CompressedLayer] = []
    total = len(model.blocks)
    for block in range(total):
        emit(Progress(stage="compress", done=block, total=total, message=f"block {block}"))
        units = [u for u in model.units if u.block == block and not plan.choices[u.name].dense]
        if units:
            moments = _second_moments(model, replay, block, hidden, units)
            done += _compress_block(model, units, plan, moments, method, layout, emit)
        hidden = [replay.run(block, h, i) for i, h in enumerate(hidden)]
    emit(Progress(stage="compress", done=total, total=total))
    return done


class _SeenAll(Exception):
    """Every linear of the block has its input: what would follow is run for nothing.

    Raised only where the first batch called each watched linear exactly once.
    """


def _second_moments(
    model: LoadedModel, replay: BlockReplay, block: int, hidden: list[Tensor], units: list[Unit]
) -> dict[str, Tensor]:
    """{unit: H_II} of a block; the linears of a fused unit share their input."""
    masks = [batch.get("attention_mask") for batch in replay.batches]
    moments = {
        unit.name: SecondMoment(unit.layers[0].shape[1], device=model.device) for unit in units
    }
    firsts = {unit.name: model.linear(unit.layers[0].name) for unit in units}
    calls: list[list[str]] = []

    def add(unit_name: str, x: Tensor) -> None:
        moments[unit_name].add(real_rows(x, masks[len(calls) - 1]))
        calls[-1].append(unit_name)
        if len(calls) > 1 and len(calls[0]) == len(firsts) == len(calls[-1]):
            raise _SeenAll

    with _watching(firsts, add):
        for index, state in enumerate(hidden):
            calls.append([])
            with suppress(_SeenAll):
                replay.run(block, state, index)
    means = {name: moment.mean_II for name, moment in moments.items()}
    for name, H_II in means.items():
        if not bool(torch.isfinite(H_II).all()):
            raise CalibrationError(
                f"the inputs of {name} are NaN or infinite on the calibration text",
                hint="try --dtype float32, or another --calibration text",
            )
    return means


def real_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Activations (rows, tokens, in) as (real tokens, in), padding left out.

    Some families hand on (rows * tokens, in); what has no row per token is kept whole.
    """
    x_MI = x.reshape(-1, x.shape[-1])
    if mask is None or len(x_MI) != mask.numel():
        return x_MI
    return x_MI[mask.flatten().bool()]


@contextmanager
def _watching(
    modules: Mapping[str, nn.Module], add: Callable[[str, Tensor], None]
) -> Iterator[None]:
    def watcher(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: add(name, args[0].detach())

    handles = [m.register_forward_pre_hook(watcher(name)) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _compress_block(
    model: LoadedModel,
    units: list[Unit],
    plan: Plan,
    moments: Mapping[str, Tensor],
    method: Compressor,
    layout: Layout,
    emit: Emit,
) -> list[CompressedLayer]:
    done = []
    for unit in units:
        for spec in unit.layers:
            module = model.linear(spec.name)
            layer = compress_layer(
                spec,
                get_weight(module).float(),
                moments[unit.name],
                plan.choices[unit.name],
                method,
                layout,
            )
            set_weight(module, layer.dense(model.dtype))
            _tell(layer, emit)
            done.append(layer)
    return done


def compress_layer(
    spec: LayerSpec,
    W_OI: Tensor,
    H_II: Tensor,
    candidate: Candidate,
    method: Compressor,
    layout: Layout = PACK_QUANTIZED,
) -> CompressedLayer:
    """Compress one linear and measure what it cost."""
    began = time.perf_counter()
    problem = layer_problem(W_OI, H_II, spec, candidate)
    solution, group = method(problem), problem.group
    Q_OI = _values(solution)
    per_channel = group == spec.shape[1]
    result = LayerResult(
        name=spec.name,
        candidate=candidate,
        group_size=0 if per_channel else group,
        nbytes=sum(tensor.nbytes for tensor in layout.tensors(spec, candidate)),
        weight_error=_ratio((W_OI - Q_OI).square().sum(), W_OI.square().sum()),
        output_error=_ratio(_energy(W_OI - Q_OI, H_II), _energy(W_OI, H_II)),
        seconds=time.perf_counter() - began,
        notes=_group_note(candidate, group, spec) + solution.notes,
    )
    return CompressedLayer(
        spec=spec,
        result=result,
        codes=solution.codes_OI,
        scale=solution.scale_OG,
        zero=solution.zero_OG,
        mask=problem.mask_OI,
    )


def _values(solution: Solution) -> Tensor:
    """The weight (out, in) that a solution stands for, float32."""
    codes_OI, scale_OG, zero_OG = solution.codes_OI, solution.scale_OG, solution.zero_OG
    if zero_OG is None:
        return dequantize(codes_OI, scale_OG, torch.float32)
    return dequantize_asymmetric(codes_OI, scale_OG, zero_OG, torch.float32)


def _energy(W_OI: Tensor, H_II: Tensor) -> Tensor:
    """E|x W^T|^2 for inputs with second moment H."""
    return ((W_OI @ H_II) * W_OI).sum()


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part) / float(whole) if float(whole) > 0 else 0.0


def _group_note(candidate: Candidate, group: int, spec: LayerSpec) -> tuple[str, ...]:
    asked = candidate.group_size
    if group == asked or not asked or (group == spec.shape[1] and asked >= spec.shape[1]):
        return ()
    got = "one scale per channel" if group == spec.shape[1] else f"groups of {group}"
    return (f"groups of {asked} do not divide {spec.shape[1]} inputs: {got}",)


def _tell(layer: CompressedLayer, emit: Emit) -> None:
    for note in layer.result.notes:
        emit(Notice(kind="fallback", subject=layer.spec.name, message=note))
