"""`cca` (CMPQ): how little of what comes in can be found in what goes out.

    s = 1 - similarity(input, output)       projection-weighted CCA (cptq.numerics.subspace)

per unit between a linear's input and its output (a fused group's outputs side by side), and per
block, as in the paper (CPTQuant, arXiv 2412.03599, CMPQ), 1 - the mean similarity of the block's
output to the outputs of all other blocks. On tokens, padding left out; the paper's code takes
mean-pooled texts with padding and only the first correlation, which saturates near 1.

From a unit's s to a score per candidate: the linear form of HIGGS (arXiv 2411.17525) with s in the
place of the probed slope, times the unit's share of the weights,

    score(c) = s (n_u / n) t^2(c),      t^2 = |dW|_F^2 / |W|_F^2 of nearest rounding.

The share is there because s is a mean over directions and does not know how many a unit has, while
a loss adds up over them (a probed slope, as in `pruning`, has it in it). It also makes units of
equal s get equal bits: where CCA has nothing to say, the plan is the uniform one.

Cost: a forward pass and two eigendecompositions per unit. Limits: s says how a unit's dominant
subspaces turn, not what an error in them costs; nothing after the unit is looked at. It is here
because the paper proposes it: look at its rank correlation with `kl` before relying on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cptq.calibration.samples import Wants
from cptq.checkpoint.model import LoadedModel
from cptq.numerics.masks import relative_error
from cptq.numerics.subspace import (
    COMPONENTS,
    TOKENS_PER_COMPONENT,
    Summary,
    principal_basis,
    similarity,
    tokens_needed,
)
from cptq.sensitivity.metric import Context, Metric, Needs, UnitView
from cptq.types import Candidate, Notice

#: the first is the one that counts
SUMMARIES: tuple[Summary, ...] = ("pwcca", "svcca", "first")
#: most token rows compared: ten for each of 64 components
COMPARED = 640


def dissimilarities(X_TF: Tensor, Y_TG: Tensor, *, components: int) -> dict[Summary, float]:
    """1 - the similarity of two views of the same tokens, in [0, 1], by each summary."""
    Qx_TK = principal_basis(X_TF, components=components)
    Qy_TL = principal_basis(Y_TG, components=components)
    return {s: 1.0 - similarity(X_TF, Qx_TK, Qy_TL, summary=s) for s in SUMMARIES}


def compared(X_TF: Tensor) -> Tensor:
    """At most `COMPARED` rows, evenly spread."""
    if len(X_TF) <= COMPARED:
        return X_TF
    return X_TF[torch.linspace(0, len(X_TF) - 1, COMPARED, device=X_TF.device).round().long()]


def block_dissimilarity(outputs: list[Tensor]) -> list[float]:
    """1 - mean similarity of each view (tokens, width) to all the others; 0 for a single one."""
    bases = [principal_basis(X_TF) for X_TF in outputs]
    result = []
    for i, X_TF in enumerate(outputs):
        others = [similarity(X_TF, bases[i], bases[j]) for j in range(len(outputs)) if j != i]
        result.append(1.0 - sum(others) / len(others) if others else 0.0)
    return result


class Cca(Metric):
    """Projection-weighted CCA; SVCCA and the first correlation stand beside it in the details."""

    needs = Needs(samples=Wants(blocks=True))

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._dissimilarity = 0.0
        self._summaries: dict[str, dict[Summary, float]] = {}

    @classmethod
    def least_tokens(cls, model: LoadedModel) -> int:
        """Ten per component of the widest layer."""
        widest = max(max(layer.shape) for unit in model.units for layer in unit.layers)
        return tokens_needed(widest)

    @property
    def score_unit(self) -> str:
        return "1 - similarity, times relative squared error, times share of the weights"

    def unit(self, view: UnitView) -> float:
        """1 - similarity of input and output; averaged where a unit's layers read other inputs."""
        inputs = {id(sample.x_TI): sample.x_TI for sample in view.samples}
        scores = [self._of_input(view, x_TI) for x_TI in inputs.values()]
        means = {s: sum(score[s] for score in scores) / len(scores) for s in SUMMARIES}
        self._summaries[view.unit.name] = means
        self._dissimilarity = means[SUMMARIES[0]]
        return self._dissimilarity

    def _of_input(self, view: UnitView, x_TI: Tensor) -> dict[Summary, float]:
        pairs = zip(view.weights, view.samples, strict=True)
        readers = [W_OI for W_OI, sample in pairs if sample.x_TI is x_TI]
        x_TI = compared(x_TI)
        y_TO = torch.cat([x_TI @ W_OI.T for W_OI in readers], dim=1)
        components = min(COMPONENTS, len(x_TI) // TOKENS_PER_COMPONENT)
        if components < min(COMPONENTS, *x_TI.shape[1:]):
            message = f"only {len(x_TI)} tokens reach it: {components} components compared"
            self.context.emit(Notice(kind="warning", subject=view.unit.name, message=message))
        if components == 0:
            return dict.fromkeys(SUMMARIES, 0.0)
        return dissimilarities(x_TI, y_TO, components=components)

    def candidate(self, view: UnitView, candidate: Candidate, errors: tuple[Tensor, ...]) -> float:
        """s (n_u / n) t^2 of one candidate."""
        share = view.unit.numel / sum(unit.numel for unit in self.context.model.units)
        return self._dissimilarity * share * relative_error(errors, view.weights)

    def per_block(self, per_unit: Mapping[str, float]) -> dict[int, float]:
        """Each block's output against those of all other blocks."""
        assert self.context.samples is not None
        outputs = [compared(X_TF) for X_TF in self.context.samples.blocks]
        scores = block_dissimilarity(outputs)
        return dict(enumerate(scores))

    def details(self) -> dict[str, Any]:
        """What each summary says of each unit."""
        return {"components": COMPONENTS, "dissimilarity": self._summaries}
