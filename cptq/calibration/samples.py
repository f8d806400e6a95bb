"""One pass over the calibration text that keeps, for every linear, a sample of what went through.

At randomly chosen token positions, the same for all layers, it keeps the input row x (in,), the
gradient row g = d(sum over rows of d . z)/dy (out,) of the linear's output y, with z the model's
answer and d a random direction of the right covariance (cptq.calibration.objective). From these,
for a weight change dW, dy = dW x and

    KL per row ~ 1/2 sum_t E (g_t . dy_t)^2 / rows of the answer      (true Fisher, token by token)

What is dropped: products of different tokens' errors (t != t').

How: hooks on the linears. No parameter needs a gradient; the embedding's output is made to, so
that a backward pass costs no more than a forward one. Inputs that several linears read (q/k/v) are
kept once. Second moments E x x^T are summed over ALL tokens of the pass where they fit. Views
(`cptq.calibration.views`) are taken at some of the same positions.

Cost: a forward pass, plus a backward pass each for Fisher and label gradients where asked for;
memory: rows x (inputs + outputs of all layers) x 4 bytes on the CPU, capped (`MEMORY_BYTES`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cptq.calibration.collector import Collector, LayerSample, Wants
from cptq.calibration.objective import Objective
from cptq.calibration.slices import Rows, micro_batches, token_count
from cptq.calibration.views import LayerView
from cptq.checkpoint.model import LoadedModel
from cptq.errors import CalibrationError
from cptq.types import Emit, Notice, Progress

__all__ = ["LayerSample", "LayerView", "Samples", "Wants", "collect_samples"]

ROWS = 1024
PASS_TOKENS = 4096
MEMORY_BYTES = 4 << 30


@dataclass(slots=True, kw_only=True, eq=False)
class Samples:
    """The outcome of a pass. `answers` is the number of rows of the answer.

    `views` and `blocks` (output rows of each block) hold the same tokens, where views are wanted.
    """

    layers: dict[str, LayerSample]
    views: dict[str, LayerView]
    blocks: list[Tensor]
    tokens: int
    answers: int


def collect_samples(
    model: LoadedModel,
    rows: Sequence[Rows],
    objective: Objective,
    wants: Wants,
    *,
    seed: int,
    emit: Emit,
    keep: int = ROWS,
    least: int = 0,
    tokens: int = PASS_TOKENS,
    memory_bytes: int = MEMORY_BYTES,
) -> Samples:
    """Run the pass.

    Args:
        model: the dense model; left as it was.
        rows: calibration batches; the first ones are used until `tokens` are reached.
        objective: how the model is judged.
        wants: what to keep.
        seed: of the positions and of the directions.
        emit: takes progress, and a notice when memory allows fewer rows than `keep`.
        keep: rows to keep per layer.
        least: rows that are kept whatever the memory.
        tokens: most tokens that flow through the model.
        memory_bytes: about how much the kept rows may take.

    Raises:
        CalibrationError: no tokens, or an activation or a gradient is NaN or infinite.
    """
    batches = micro_batches(first_rows(rows, tokens))
    total = token_count(batches)
    if total == 0:
        raise CalibrationError("the calibration data holds no tokens")
    keep = min(_affordable(model, wants, keep, least, memory_bytes, emit), total)
    collector = Collector(model, wants, seed, keep)
    with collector.installed():
        done = answers = 0
        for step, batch in enumerate(batches):
            count = token_count([batch])
            quota = (done + count) * keep // total - done * keep // total
            answers += collector.run(batch, objective, quota)
            done += count
            message = f"{done:,} of {total:,} tokens"
            emit(Progress(stage="samples", done=step + 1, total=len(batches), message=message))
    return Samples(
        layers=collector.layers(answers),
        views=collector.views.layers(),
        blocks=collector.views.blocks(),
        tokens=total,
        answers=answers,
    )


def first_rows(rows: Sequence[Rows], tokens: int) -> list[Rows]:
    """The first batches that hold `tokens` together, or all there are."""
    chosen: list[Rows] = []
    done = 0
    for batch in rows:
        if done >= tokens:
            break
        chosen.append(batch)
        done += token_count([batch])
    return chosen


def _affordable(
    model: LoadedModel, wants: Wants, keep: int, least: int, memory_bytes: int, emit: Emit
) -> int:
    """Rows that fit: every fused unit keeps its input once and each of its outputs' gradients."""
    floats = sum(unit.layers[0].shape[1] for unit in model.units)
    outputs = sum(layer.shape[0] for unit in model.units for layer in unit.layers)
    floats += outputs * (int(wants.gradients) + int(wants.label_gradients))
    fits = max(memory_bytes // (4 * max(floats, 1)), 1)
    if fits >= keep or not wants.backward:
        return keep
    emit(
        Notice(
            kind="info",
            subject="sensitivity samples",
            message=f"{max(fits, least)} token rows per layer instead of {keep}, to stay near"
            f" {memory_bytes / 2**30:.1f} GiB",
        )
    )
    return max(fits, least)
