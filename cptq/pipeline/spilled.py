"""The most that can lie on the disk of what waits, counted before a run begins: activations, and
the codes of what a search or a trial has compressed.

With T(x) the token positions of a text x, padding included, w the width of the hidden states, e the
bytes of a number in the type that the model runs in, B the blocks and V the outputs of the model:

    S(x) = T(x) w e                              one hidden state per position
    b(x)                                         S of the largest batch: while a state is replaced,
                                                 the old one and the new one are there
    pass(x)       = (B + 1) S(x) + b(x)          a sampling pass with gradients (`block_chain`)
                  = S(x) + b(x)                  without
    dense(x)      = B S(x) + b(x) + R(x)         what trials of single units start from
                  = R(x)                         of whole models (`divergence_from_dense`)
    R(x)          = judged positions V 4
    judge(x)      = S(x) + b(x) + R(x)           a changed model, all of x block by block
    blocks(x, y)  = S(x) + S(y) + b(x, y)        a plan that is carried out on x, judged on y
                  + S(x / 2) + T(x / 2) r e      corrected: the dense stream of half of the batches,
                                                 and what the units of a block read, r numbers each
                  + S(x)                         with a packed embedding (`compression.streams`)
                  + (T(x) + T(y)) i e            what a unit of i inputs reads, while batches wait
                  + m (1 + log2 PARTS) in^2 4    m moments of the widest unit, in parts that wait
    tune(x)       = S(x) + R(y)                  the dense model's last states, y judges

The stages of a run follow one another, so the largest counts. A text that fits into the memory for
activations (`Spill.limit`) never goes to the disk; of one that does not, all is counted, as what
came first may be gone when what came last is still on the disk. Activations on a GPU stay there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from cptq.calibration.batches import (
    Batch,
    Split,
    choose_held_out_tokens,
    select_gradient_rows,
    split_batches,
    split_held_out,
)
from cptq.calibration.depth import take_rows
from cptq.calibration.divergence_from_dense import JUDGED_EVERY
from cptq.calibration.holdout import split_parts
from cptq.calibration.samples import PASS_TOKENS, take_batches
from cptq.calibration.tokens import Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.ranks import PARTS
from cptq.compression import CORRECTING, WITHOUT_ACTIVATIONS
from cptq.compression.streams import DENSE_SHARE
from cptq.compression.tune import list_steps
from cptq.compression.vocabulary import is_head
from cptq.config import GROUND_TRUTH
from cptq.pipeline.uniform_check import TRIAL_TOKENS
from cptq.sensitivity import METRICS
from cptq.sensitivity.path_metric import PATH_TOKENS
from cptq.types import Candidate

if TYPE_CHECKING:  # they import this module
    from cptq.pipeline.analyze import AnalyzeInputs
    from cptq.pipeline.inputs import CompressInputs


def bound_compress(inputs: CompressInputs) -> int:
    """Return the most bytes of activations that `cptq compress` has on the disk at once."""
    model, text = inputs.model, inputs.held_out
    stages = [0]
    candidates = inputs.space.candidates
    if inputs.measures:
        metrics, outer = (inputs.settings.metric,), inputs.scores_vocabulary
        measured = _bound_measurement(model, inputs.calibration, metrics, outer=outer)
        stages.append(measured + _count_scored_codes(model, metrics, candidates))
    if inputs.settings.refine:
        judged = _count_references(model, text.search) + _count_references(model, text.guard)
        passed = bound_pass(model, inputs.calibration.batches, back=False)
        stages.append(passed + judged + _count_codes(model, candidates, len(candidates)))
    if inputs.compare_with_baseline:
        part = take_batches(inputs.calibration.batches, TRIAL_TOKENS)
        passed = bound_pass(model, part, back=False) + _count_codes(model, candidates, 2)
        stages.append(_count_references(model, text.judge) + passed)
    settings = inputs.settings
    kept = _count_references(model, text.tune) if settings.tune else 0
    kept += _count_references(model, text.judge) if settings.tune or settings.evaluate else 0
    if settings.evaluate:
        states = len(model.block_names) + 1
        kept += states * _count_state(model, take_rows(text.judge))
    stages.append(kept + _bound_blocks(inputs, inputs.calibration.batches, text.errors))
    passes = [bound_pass(model, rows, back=False) for rows in (text.judge, text.tune) if rows]
    stages.append(kept + max(passes, default=0))
    if settings.tune:
        stages.append(kept + _count_state(model, list_steps(model, inputs.calibration)))
    return _limit(model, max(stages))


def bound_analyze(inputs: AnalyzeInputs) -> int:
    """Return the most bytes of activations that `cptq analyze` has on the disk at once."""
    model, calibration, settings = inputs.model, inputs.calibration, inputs.settings
    if calibration is None:
        return 0
    outer = bool(inputs.vocabulary)
    codes = _count_scored_codes(model, inputs.missing, inputs.candidates)
    stages = [_bound_measurement(model, calibration, inputs.missing, outer=outer) + codes]
    if settings.validate:
        stages.append(_bound_hessians(model, calibration, settings.compressor))
        part = split_parts(model, calibration.held_out, 1)[0]
        tried = _count_codes(model, inputs.candidates, len(inputs.candidates))
        stages.append(_bound_dense(model, part) + bound_pass(model, part, back=False) + tried)
    return _limit(model, max(stages))


def _limit(model: LoadedModel, most: int) -> int:
    """Return what of the most bytes of activations can be on the disk."""
    limit = model.spill.limit
    return 0 if limit is None or most <= limit or model.device.type != "cpu" else most


def _bound_measurement(
    model: LoadedModel, calibration: Calibration, metrics: Collection[str], *, outer: bool
) -> int:
    """Bound the passes that metrics share; `outer`: the vocabulary is scored, too."""
    kinds = [METRICS.get(name) for name in metrics]
    if not any(kind.needs.text for kind in kinds):
        return 0
    split = _split(model, calibration)
    fit = split_batches(take_batches(split.fit, PASS_TOKENS))
    samples = [kind.needs.samples for kind in kinds if kind.needs.samples is not None]
    ways = [0]
    if samples:
        ways.append(bound_pass(model, fit, back=any(request.gradients for request in samples)))
    if any(kind.needs.path for kind in kinds):
        few = select_gradient_rows(split.fit, model.kind, PATH_TOKENS)
        ways.append(bound_pass(model, few, back=True))
    judges = outer or any(kind.needs.divergence for kind in kinds)
    measured = max(ways) + (_bound_dense(model, split.held_out) if judges else 0)
    return max(
        measured,
        bound_pass(model, calibration.batches, back=False) if GROUND_TRUTH in metrics else 0,
    )


def _split(model: LoadedModel, calibration: Calibration) -> Split:
    """Return the text that is sampled, and what is held out of it, as `sensitivity.prepare`."""
    held_out = choose_held_out_tokens(model.parameters, model.device.type == "cpu")
    return split_held_out(calibration.batches, model.kind, held_out)


def _bound_hessians(model: LoadedModel, calibration: Calibration, compressor: str) -> int:
    """Bound the pass that gathers the second moments of all units."""
    if compressor in WITHOUT_ACTIVATIONS:
        return 0
    return bound_pass(model, calibration.batches, back=False)


def bound_pass(model: LoadedModel, batches: Sequence[Batch], *, back: bool) -> int:
    """Bound a pass of a text over all blocks, forward or also `back`."""
    states = len(model.block_names) + 1 if back else 1
    return states * _count_state(model, batches) + _count_largest(model, batches)


def _bound_dense(model: LoadedModel, batches: Sequence[Batch]) -> int:
    """Bound the inputs of all blocks and the outputs of held-out text."""
    inputs = len(model.block_names) * _count_state(model, batches)
    return inputs + _count_largest(model, batches) + _count_references(model, batches)


def _count_codes(model: LoadedModel, candidates: Collection[Candidate], times: int) -> int:
    """Return the bytes of all units compressed some times: codes, masks and scales."""
    weights = sum(layer.numel for unit in model.all_units for layer in unit.layers)
    masks = any(candidate.sparsity for candidate in candidates)
    return times * (weights * (2 if masks else 1) + weights // 8)


def _count_scored_codes(
    model: LoadedModel, metrics: Collection[str], candidates: Collection[Candidate]
) -> int:
    """Return the bytes of what a metric keeps that tries all units at all candidates."""
    tried = sum(not candidate.dense for candidate in candidates)
    return _count_codes(model, candidates, tried) if GROUND_TRUTH in metrics else 0


def _bound_blocks(inputs: CompressInputs, batches: Sequence[Batch], judged: Sequence[Batch]) -> int:
    """Bound a plan that is carried out block by block."""
    model, corrects = inputs.model, inputs.settings.compressor in CORRECTING
    total = _count_state(model, batches) + _count_state(model, judged)
    total += _count_largest(model, [*batches, *judged])
    total += (2 if corrects else 1) * _count_waiting_sums(model, batches, one_by_one=corrects)
    total += _count_waiting_sums(model, judged, one_by_one=corrects)
    if corrects:
        half = batches[: math.ceil(len(batches) * DENSE_SHARE)]
        read = count_positions(half) * _count_read(model) * model.dtype.itemsize
        widest = max(unit.layers[0].shape[1] for unit in model.units)
        parked = count_positions([*batches, *judged]) * widest * model.dtype.itemsize
        total += _count_state(model, half) + read + parked
        if any(not is_head(unit) for unit in inputs.space.cost.units if unit.block is None):
            total += _count_state(model, batches)
    return total


def _count_waiting_sums(model: LoadedModel, batches: Sequence[Batch], *, one_by_one: bool) -> int:
    """Return the bytes of the sums of one kind of moment that wait for others to be added.

    One of each level of the tree of `PARTS` parts (of as many as there are batches, if those are
    fewer), and one more while two are added, for all units of a stage.
    """
    stages = [0]
    for block in range(len(model.blocks)):
        units = [unit for unit in model.units if unit.block == block]
        sizes = [4 * unit.layers[0].shape[1] ** 2 for unit in units]
        together = [
            size
            for unit, size in zip(units, sizes, strict=True)
            if unit.layers[0].expert or not one_by_one
        ]
        stages += [sum(together), max(sizes, default=0)]
    levels = math.ceil(math.log2(min(PARTS, len(batches)))) + 1 if batches else 0
    return levels * max(stages)


def count_positions(batches: Sequence[Batch]) -> int:
    """Return the token positions of a text, padding included."""
    return sum(batch["input_ids"].numel() for batch in batches)


def _count_state(model: LoadedModel, batches: Sequence[Batch]) -> int:
    return count_positions(batches) * model.hidden_size * model.dtype.itemsize


def _count_largest(model: LoadedModel, batches: Sequence[Batch]) -> int:
    return max((_count_state(model, [batch]) for batch in batches), default=0)


def _count_read(model: LoadedModel) -> int:
    """Return how many numbers the units of a block read per position, in the block of the most."""
    blocks: dict[int | None, int] = {}
    for unit in model.units:
        first = unit.layers[0]
        blocks[unit.block] = blocks.get(unit.block, 0) + (0 if first.expert else first.shape[1])
    return max(blocks.values())


def _count_references(model: LoadedModel, batches: Sequence[Batch]) -> int:
    """Return the bytes of the dense model's outputs for held-out text, float32."""
    config = model.config.get_text_config()
    if model.kind in ("causal-lm", "masked-lm"):
        rows = sum(len(batch["input_ids"]) * _count_judged(batch) for batch in batches)
        return 4 * rows * int(config.vocab_size)
    rows = sum(len(batch["input_ids"]) for batch in batches)
    return 4 * rows * max(model.hidden_size, int(getattr(config, "num_labels", 0)))


def _count_judged(batch: Batch) -> int:
    """Return the positions of a row that are judged."""
    length = batch["input_ids"].shape[1]
    return length // JUDGED_EVERY if length >= 8 * JUDGED_EVERY else length
