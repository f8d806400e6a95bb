"""Compress a model block by block, each on the activations of what is already compressed.

For every block: run it on the hidden states that the compressed blocks before it produce, sum each
linear's Hessian on the way, compress its linears, run it again with the new weights. So a block
sees the errors of those before it (GPTQ, arXiv 2210.17323, section 4). Memory: one hidden state
per token, and the Hessians of one block. Cost: two forward passes over the blocks, the first
without what follows the last linear's input. Held-out text, on which output errors are measured,
takes the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch import Tensor, nn

from cptq.calibration.batches import Batch
from cptq.calibration.replay import BlockReplay
from cptq.calibration.tokens import Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.compression import COMPRESSORS
from cptq.compression.layer import compress_module
from cptq.errors import CalibrationError
from cptq.layouts import Layout
from cptq.layouts.pack_quantized import PACK_QUANTIZED
from cptq.numerics.hessian import SecondMoment
from cptq.types import CompressedLayer, Emit, Notice, Plan, Progress, Unit


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
        One `CompressedLayer` for every linear that is not kept dense, in forward order.

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
    calibrating = _Stream(model, calibration.batches)
    judging = _Stream(model, list(held_out)) if held_out else None
    done: list[CompressedLayer] = []
    total = len(model.blocks)
    for block in range(total):
        emit(Progress(stage="compress", done=block, total=total, message=f"block {block}"))
        units = [u for u in model.units if u.block == block and not plan.choices[u.name].dense]
        if units:
            moments = calibrating.collect_moments(block, units)
            others = judging.collect_moments(block, units) if judging else {}
            done += _compress_units(model, units, plan, moments, others, compress, emit)
        calibrating.advance(block)
        if judging:
            judging.advance(block)
    emit(Progress(stage="compress", done=total, total=total))
    return done


class _Stream:
    """The hidden states of a text on their way through the blocks as these are now."""

    def __init__(self, model: LoadedModel, batches: list[Batch]) -> None:
        self._model = model
        self._replay = BlockReplay(model, batches)
        self._hidden = [self._replay.embed(index) for index in range(len(batches))]

    def collect_moments(self, block: int, units: list[Unit]) -> dict[str, Tensor]:
        """Return {unit: H_II}, the second moments of the inputs of units of one block."""
        return _collect_moments(self._model, self._replay, block, self._hidden, units)

    def advance(self, block: int) -> None:
        """Run one block; the states are then its output."""
        self._hidden = [self._replay.run(block, h, i) for i, h in enumerate(self._hidden)]


class _SeenAll(Exception):
    """Every linear of the block has its input: what would follow is run for nothing.

    Raised only where the first batch called each watched linear exactly once.
    """


def _collect_moments(
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
        moments[unit_name].add(select_real_rows(x, masks[len(calls) - 1]))
        calls[-1].append(unit_name)
        if len(calls) > 1 and len(calls[0]) == len(firsts) == len(calls[-1]):
            raise _SeenAll

    with _watch_inputs(firsts, add):
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


def select_real_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Activations (rows, tokens, in) as (real tokens, in), padding left out.

    Some families hand on (rows * tokens, in); what has no row per token is kept whole.
    """
    x_MI = x.reshape(-1, x.shape[-1])
    if mask is None or len(x_MI) != mask.numel():
        return x_MI
    return x_MI[mask.flatten().bool()]


@contextmanager
def _watch_inputs(
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


def _compress_units(
    model: LoadedModel,
    units: list[Unit],
    plan: Plan,
    moments: Mapping[str, Tensor],
    held_out: Mapping[str, Tensor],
    compress: Callable[..., CompressedLayer],
    emit: Emit,
) -> list[CompressedLayer]:
    """Compress the layers of some units in place, and report their notes."""
    done = []
    for unit in units:
        for spec in unit.layers:
            module, candidate = model.linear(spec.name), plan.choices[unit.name]
            H_II, other_II = moments[unit.name], held_out.get(unit.name)
            done.append(compress(module, spec, H_II, candidate, held_out_II=other_II))
            _emit_notes(done[-1], emit)
    return done


def _emit_notes(layer: CompressedLayer, emit: Emit) -> None:
    for note in layer.result.notes:
        emit(Notice(kind="fallback", subject=layer.spec.name, message=note))
