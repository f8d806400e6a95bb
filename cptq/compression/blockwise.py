"""Compress a model block by block, each on the activations of what is already compressed.

For every block: run it on the hidden states that the compressed blocks before it produce, sum each
linear's Hessian on the way, compress its linears, run it again with the new weights. So a block
sees the errors of those before it (GPTQ, arXiv 2210.17323, section 4).

A compressor that corrects (`CORRECTING`) goes further: units are taken one after the other also
inside a block, and each is compressed towards the weight that makes up for part of the errors
before it, for which the dense model's hidden states travel along (`compression.streams`).

Several processes (`checkpoint.ranks`) share this out: each takes some of the batches through the
blocks, and compresses some of the layers of a stage, which the others get from it.

Each block is a step that may be finished already (`Steps`): then its layers are taken as they are,
and only the hidden states run through it.

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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cptq.calibration.batches import Batch
from cptq.calibration.tokens import Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.ranks import ALONE, Ranks
from cptq.checkpoint.weights import get_weight
from cptq.compression import COMPRESSORS, CORRECTING, WITHOUT_ACTIVATIONS
from cptq.compression.layer import compress_module
from cptq.compression.restored import place_layer, restore_layers
from cptq.compression.scores import USUAL_MASKING, Masking
from cptq.compression.streams import Moments, Stream, embed_batches
from cptq.compression.vocabulary import choose_compressor, is_head
from cptq.layouts import Layout
from cptq.layouts.pack_quantized import PACK_QUANTIZED
from cptq.numerics.asymmetric_target import compute_asymmetric_targets
from cptq.types import CompressedLayer, Emit, LayerSpec, Notice, Plan, Progress, Unit

#: names of the steps outside the blocks
EMBEDDING, HEAD = "embedding", "head"


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What is finished of a plan that is carried out, step by step: embedding, blocks, head.

    Attributes:
        load: returns the layers of a step by its name; None where it is not finished.
        save: takes the layers of a step that is finished; returns them as they are from now on,
            perhaps mapped from a file.
    """

    load: Callable[[str], list[CompressedLayer] | None] = lambda _step: None
    save: Callable[[str, list[CompressedLayer]], list[CompressedLayer]] = lambda _step, made: made

    def share(self, ranks: Ranks) -> Steps:
        """Return steps that the first process loads for all, and saves for all."""
        return Steps(
            load=lambda step: ranks.share(None if ranks.index else self.load(step)),
            save=self.save,
        )


@torch.no_grad()
def compress_model(
    model: LoadedModel,
    calibration: Calibration,
    plan: Plan,
    *,
    compressor: str,
    float16_scales: bool = False,
    layout: Layout = PACK_QUANTIZED,
    masking: Masking = USUAL_MASKING,
    held_out: Sequence[Batch] = (),
    steps: Steps | None = None,
    ranks: Ranks = ALONE,
    emit: Emit,
) -> list[CompressedLayer]:
    """Carry out a plan; afterwards `model.module` computes with the compressed weights.

    `layout` counts the bytes of a layer. `float16_scales` makes every scale one that float16 holds,
    whatever the checkpoint's type. `masking`: what sparse layers keep. `held_out` are batches that
    do not calibrate, on which output errors are measured; without any, on those that do. `steps`
    that are finished are not made again, and the result is the same to the bit. Several `ranks`
    call this alike and get the same.

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
        masking=masking,
    )
    finished = (steps or Steps()).share(ranks)
    run = _CarryingOut(model, plan, compressor, compress, finished, ranks, emit)
    if not run.restore_all():
        run.compress_all(calibration, held_out)
    total = len(model.blocks)
    emit(Progress(stage="compress", done=total, total=total))
    return run.list_layers()


class _CarryingOut:
    """A plan that is carried out, with what is finished of it: {step: layers}."""

    def __init__(
        self,
        model: LoadedModel,
        plan: Plan,
        compressor: str,
        compress: partial[CompressedLayer],
        steps: Steps,
        ranks: Ranks,
        emit: Emit,
    ) -> None:
        self._model, self._plan, self._ranks, self._emit = model, plan, ranks, emit
        self._compressor, self._compress, self._steps = compressor, compress, steps
        chosen = [unit for unit in model.vocabulary if unit.name in plan.choices]
        chosen = [unit for unit in chosen if not plan.choices[unit.name].dense]
        self._embeddings = [unit for unit in chosen if not is_head(unit)]
        self._heads = [unit for unit in chosen if is_head(unit)]
        self._names = [
            *([EMBEDDING] if self._embeddings else []),
            *(name_block(block) for block in range(len(model.blocks))),
            *([HEAD] if self._heads else []),
        ]
        self._done = dict(self._load_finished())

    def _load_finished(self) -> Iterator[tuple[str, list[CompressedLayer]]]:
        for name in self._names:
            layers = self._steps.load(name)
            if layers is None:
                return
            yield name, [place_layer(self._model, layer) for layer in layers]

    def list_layers(self) -> list[CompressedLayer]:
        """Return the layers of all steps."""
        return [layer for name in self._names for layer in self._done[name]]

    def restore_all(self) -> bool:
        """Give the model its weights where all steps are finished; return whether they are."""
        if len(self._done) < len(self._names):
            return False
        for name in self._names:
            self._restore(name)
        return True

    def _restore(self, name: str) -> None:
        restore_layers(self._model, self._done[name])

    def _save(self, name: str, layers: list[CompressedLayer]) -> None:
        saved = self._steps.save(name, layers)
        self._done[name] = [place_layer(self._model, layer) for layer in saved]
        self._restore(name)  # from now on from what was saved, so that no copy is kept in memory

    def compress_all(self, calibration: Calibration, held_out: Sequence[Batch]) -> None:
        """Make the steps that are not finished."""
        model, corrects = self._model, self._compressor in CORRECTING
        first = corrects and self._embeddings
        text, ranks = calibration.batches, self._ranks
        embedded = embed_batches(model, text, ranks) if first else None
        if self._embeddings:
            self._compress_embeddings()
        calibrating = Stream(model, text, dense=corrects, embedded=embedded, ranks=ranks)
        judging = Stream(model, held_out, ranks=ranks) if held_out else None
        total = len(model.blocks)
        for block in range(total):
            message = f"block {block}"
            self._emit(Progress(stage="compress", done=block, total=total, message=message))
            self._compress_block(block, calibrating, judging)
        if self._heads:
            self._compress_heads(calibrating, judging)

    def _compress_embeddings(self) -> None:
        if EMBEDDING in self._done:
            self._restore(EMBEDDING)
            return
        nothing = {unit.name: Moments(H_II=None) for unit in self._embeddings}
        self._save(EMBEDDING, self._compress_stage(self._embeddings, nothing, {}))

    def _compress_block(self, block: int, calibrating: Stream, judging: Stream | None) -> None:
        model, plan, name = self._model, self._plan, name_block(block)
        if name in self._done:
            calibrating.enter_block(block, ())
            self._restore(name)
            for stream in (calibrating, *([judging] if judging else [])):
                stream.pass_block(block)
            return
        units = [u for u in model.units if u.block == block and not plan.choices[u.name].dense]
        in_order = calibrating.enter_block(block, units)
        stages = _split_stages(units, one_by_one=self._compressor in CORRECTING)
        owns = calibrating.walk(block, stages, in_order=in_order)
        others = judging.walk(block, stages, in_order=in_order) if judging else [{}] * len(stages)
        made: list[CompressedLayer] = []
        # strict: asks the walks for one more than there is, so that they go on to the block's end
        for stage, own, other in zip(stages, owns, others, strict=True):
            made += self._compress_stage(stage, own, other)
        self._save(name, made)

    def _compress_heads(self, calibrating: Stream, judging: Stream | None) -> None:
        made, total = [], len(self._model.blocks)
        for unit in self._heads:
            self._emit(Progress(stage="compress", done=total, total=total, message=unit.name))
            reads = self._compressor not in WITHOUT_ACTIVATIONS
            own = calibrating.collect_head() if reads else Moments(H_II=None)
            other = {unit.name: judging.collect_head()} if reads and judging else {}
            made += self._compress_stage([unit], {unit.name: own}, other)
        self._save(HEAD, made)

    def _compress_stage(
        self, units: Sequence[Unit], own: dict[str, Moments], other: dict[str, Moments]
    ) -> list[CompressedLayer]:
        """Compress layers in place, each in one of the processes, and report their notes.

        The moments of a unit are taken out of `own` and `other`, and go when it is done.
        """
        specs = [spec for unit in units for spec in unit.layers]
        costs = [_estimate_cost(spec) for spec in specs]
        owners = dict(zip((spec.name for spec in specs), self._ranks.assign(costs), strict=True))
        made: dict[str, CompressedLayer] = {}
        for unit in units:
            mine = [spec for spec in unit.layers if owners[spec.name] == self._ranks.index]
            made |= self._compress_unit(unit, mine, own.pop(unit.name), other.pop(unit.name, None))
        return [self._share(spec, made.get(spec.name), owners[spec.name]) for spec in specs]

    def _compress_unit(
        self, unit: Unit, specs: Sequence[LayerSpec], own: Moments, other: Moments | None
    ) -> dict[str, CompressedLayer]:
        """Compress some layers of a unit in place; return {layer: what became of it}."""
        H_II, held_out_II = own.H_II, None if other is None else other.H_II
        targets = self._find_targets(specs, own)
        del own, other  # C_II is not needed any more, and as large as what a factorization needs
        method, candidate = self._compress.keywords["method"], self._plan.choices[unit.name]
        if unit.block is None:
            method = choose_compressor(unit, method)
        made = {}
        for spec in specs:
            made[spec.name] = self._compress(
                self._model.linear(spec.name),
                spec,
                H_II,
                candidate,
                method=method,
                target_OI=targets.pop(spec.name, None),
                held_out_II=held_out_II,
            )
        return made

    def _find_targets(self, specs: Sequence[LayerSpec], own: Moments) -> dict[str, Tensor]:
        """Return {layer: weight to come near to} where that is not the dense one."""
        if own.H_II is None or own.C_II is None or not specs:
            return {}
        weights = [get_weight(self._model.linear(spec.name)).float() for spec in specs]
        targets = compute_asymmetric_targets(weights, own.H_II, own.C_II)
        return {spec.name: target for spec, target in zip(specs, targets, strict=True)}

    def _share(self, spec: LayerSpec, made: CompressedLayer | None, owner: int) -> CompressedLayer:
        """Return a layer that one of the processes has compressed."""
        layer = self._ranks.share(made, owner)
        if made is None:
            restore_layers(self._model, [layer])
        for note in layer.result.notes:
            self._emit(Notice(kind="fallback", subject=spec.name, message=note))
        return layer


def _estimate_cost(spec: LayerSpec) -> float:
    """Return about the multiply-adds of compressing a layer: factors, and the sweep."""
    out, features = spec.shape
    return features * features * (features + out)


def name_block(block: int) -> str:
    """Return the name of the step of a block."""
    return f"block-{block}"


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
