"""Score whole blocks, the unit of decision of CPTQuant (arXiv 2412.03599): CMPQ, PMPQ and TDMPQ.

The metrics of this package score linears and fused groups. The paper scores blocks, and gives all
weights of a block one width. For block b with output H_b, and D = the divergence from the dense
model on held-out rows, per output row:

    CMPQ   s_b = 1 - mean over all other blocks j of similarity(H_b, H_j)
    PMPQ   s_b = area under D(all units of b pruned to sparsity p),  p = 0, 0.1, 0.3, 0.5
    TDMPQ  s_b = mean over draws of D(b reads h + sigma |h| eps),    eps ~ N(0, 1), sigma = 0.1

CMPQ is given twice: with the projection-weighted mean of the canonical correlations (`cca`) and
with the first one (`cca-first`), which the paper's code takes.

Departures from the paper's code: CMPQ compares tokens without padding, not mean-pooled texts; PMPQ
prunes weights only, one threshold per matrix, at three sparsities instead of one; TDMPQ puts the
noise on the block's input, as the paper's equation does, and not on a parameter; PMPQ and TDMPQ
take the divergence from the dense model instead of a task's loss, so labels add no noise and a
test split is not needed.

These are not the sums over units that `SensitivityTable.per_block` holds: pruning a block as a
whole includes the interactions of its units, and its input is not the input of any of its linears.
The metrics do not measure them, as that would cost `analyze` three and eight trials more per block
for numbers that no allocator of cptq reads.

Cost: per block three trials for PMPQ and `DRAWS` for TDMPQ, each half a forward pass of the
held-out rows on average; one basis per block for CMPQ. Limits: a score is blind to which weights
of a block are sensitive and does not depend on the width; draws show the spread due to the noise
(`spread`), not that due to the held-out rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from cptq.calibration.divergence_from_dense import DivergenceFromDense
from cptq.calibration.tokens import Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight
from cptq.errors import ModelError
from cptq.numerics.canonical_correlation import Summary
from cptq.numerics.masks import prune_by_magnitude
from cptq.sensitivity.cca import Cca, compute_block_dissimilarities
from cptq.sensitivity.perturbation import NOISE
from cptq.sensitivity.prepare import check_units, prepare_context
from cptq.sensitivity.pruning import SPARSITIES, Pruning, integrate_curve
from cptq.types import Emit, Progress

#: draws of the noise that TDMPQ is averaged over
DRAWS = 8
#: the paper's algorithms, by what the results are called; CMPQ with the summary of its correlations
CMPQ: Mapping[str, Summary] = {"CMPQ": "pwcca", "CMPQ, first correlation": "first"}
PMPQ, TDMPQ = "PMPQ", "TDMPQ"
ALGORITHMS = (*CMPQ, PMPQ, TDMPQ)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockScores:
    """Scores of all blocks by one algorithm; higher means more sensitive.

    Attributes:
        algorithm: a name of `ALGORITHMS`.
        unit: what the scores are measured in.
        scores: block index -> score.
        spread: block index -> standard deviation of the score over draws of the noise; empty where
            nothing is drawn. The score is the mean, so its standard error is spread / sqrt(draws).
        trials: block index -> what the score was computed from: the divergence at each sparsity, or
            of each draw; empty for CMPQ.
    """

    algorithm: str
    unit: str
    scores: Mapping[int, float]
    spread: Mapping[int, float]
    trials: Mapping[int, tuple[float, ...]]


def measure_blocks(
    model: LoadedModel, calibration: Calibration, *, seed: int, emit: Emit, draws: int = DRAWS
) -> dict[str, BlockScores]:
    """Score every block by CMPQ, PMPQ and TDMPQ; the model is left as it was.

    Args:
        model: the dense model.
        calibration: its end is held out for PMPQ and TDMPQ, the rest is sampled for CMPQ.
        seed: seed of the sampled positions and of the noise.
        emit: takes progress and notices.
        draws: draws of the noise.

    Returns:
        {name of `ALGORITHMS`: scores}.

    Raises:
        CalibrationError: too few tokens, or an output that is NaN or infinite.
        ModelError: the model has no blocks, nothing to compress, or weights that are not finite.
    """
    check_units(model)
    if not model.block_names:
        raise ModelError(
            f"{model.source} has no blocks to score", hint="score its units with cptq analyze"
        )
    kinds = {"cca": Cca, "pruning": Pruning}
    context = prepare_context(model, kinds, calibration, (), seed, emit)
    assert context.samples is not None
    assert context.divergence is not None
    context.samples.run_to_end()
    found = compute_block_dissimilarities(context.samples.block_outputs)
    similarity = [_from_similarity(name, found[summary]) for name, summary in CMPQ.items()]
    pruning = _score_by_pruning(model, context.divergence, context.objective.unit, emit)
    noise = _score_by_noise(model, context.divergence, context.objective.unit, seed, draws, emit)
    return {scores.algorithm: scores for scores in (*similarity, pruning, noise)}


def _from_similarity(name: str, dissimilarities: Sequence[float]) -> BlockScores:
    return BlockScores(
        algorithm=name,
        unit="1 - mean similarity",
        scores=dict(enumerate(dissimilarities)),
        spread={},
        trials={},
    )


def prune_block(
    model: LoadedModel, divergence: DivergenceFromDense, block: int, sparsity: float
) -> float:
    """Return the divergence with all units of a block pruned by magnitude.

    Each matrix loses the smallest `sparsity` share of its own weights; norms and biases stay.
    """
    specs = [spec for unit in model.units if unit.block == block for spec in unit.layers]
    pruned = {
        spec.name: prune_by_magnitude(get_weight(model.linear(spec.name)).float(), sparsity)
        for spec in specs
    }
    return divergence.measure_layers(pruned, block)


def _score_by_pruning(
    model: LoadedModel, divergence: DivergenceFromDense, unit: str, emit: Emit
) -> BlockScores:
    blocks = range(len(model.block_names))
    trials = {}
    for block in blocks:
        emit(Progress(stage=PMPQ, done=block, total=len(blocks)))
        trials[block] = tuple(prune_block(model, divergence, block, p) for p in SPARSITIES)
    emit(Progress(stage=PMPQ, done=len(blocks), total=len(blocks)))
    scores = {block: integrate_curve(SPARSITIES, curve) for block, curve in trials.items()}
    return BlockScores(
        algorithm=PMPQ, unit=f"{unit} x sparsity", scores=scores, spread={}, trials=trials
    )


def _score_by_noise(
    model: LoadedModel,
    divergence: DivergenceFromDense,
    unit: str,
    seed: int,
    draws: int,
    emit: Emit,
) -> BlockScores:
    blocks = range(len(model.block_names))
    trials = {}
    for block in blocks:
        emit(Progress(stage=TDMPQ, done=block, total=len(blocks)))
        # the same eps for every block: what is left of the noise moves all scores together
        trials[block] = tuple(
            divergence.measure_block_noise(block, NOISE, seed * draws + draw)
            for draw in range(draws)
        )
    emit(Progress(stage=TDMPQ, done=len(blocks), total=len(blocks)))
    return BlockScores(
        algorithm=TDMPQ,
        unit=unit,
        scores={block: fmean(each) for block, each in trials.items()},
        spread={block: stdev(each) if draws > 1 else 0.0 for block, each in trials.items()},
        trials=trials,
    )
