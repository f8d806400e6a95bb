"""`cca` (CMPQ): how much a unit changes the representation of its tokens.

    s = 1 - similarity(input, output)                               projection-weighted CCA

(cptq.numerics.canonical_correlation), per unit between a linear's input and its output (a fused
group's outputs side by side), and per block, as in the paper (CPTQuant, arXiv 2412.03599, CMPQ),
1 - the mean similarity of the block's output to the outputs of all other blocks.

Departures: measured on tokens, without padding; the paper's code takes mean-pooled texts with
padding and only the first correlation, which saturates near 1.

Three metrics differ in how the correlations are averaged into the similarity: `cca` weights them
by projection (PWCCA), `cca-svcca` takes the plain mean (SVCCA), `cca-first` the first alone (the
paper's). All three come from one decomposition, and the details hold all three.

Scores come from s by `cptq.sensitivity.slope_metric`: s (n_u / n) t^2.

Cost: a forward pass, two bases per unit and one per block. Limits: s measures how a unit's
dominant subspaces turn, not what an error in them costs; nothing after the unit is considered.
Included because the paper proposes it: check its rank correlation with `kl` before relying on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from cptq.calibration.recorder import LayerActivations, SampleRequest
from cptq.checkpoint.model import LoadedModel
from cptq.numerics.canonical_correlation import (
    COMPONENTS,
    LEAST_PER_COMPONENT,
    SUMMARIES,
    TOKENS_PER_COMPONENT,
    Summary,
    compute_pairwise_similarities,
    compute_principal_basis,
    compute_similarities,
    count_tokens_needed,
    standardize,
)
from cptq.sensitivity.metric import Needs, UnitView
from cptq.sensitivity.slope_metric import DimensionlessMetric
from cptq.types import Notice

#: tokens that are compared
COMPARED_TOKENS = TOKENS_PER_COMPONENT * COMPONENTS


def compute_dissimilarities(X_TF: Tensor, Y_TG: Tensor, *, components: int) -> dict[Summary, float]:
    """Return 1 - the similarity of two views of the same tokens, in [0, 1], by each summary."""
    X_TF, Y_TG = standardize(X_TF), standardize(Y_TG)
    Qx_TK = compute_principal_basis(X_TF, components=components)
    Qy_TL = compute_principal_basis(Y_TG, components=components)
    return {s: 1.0 - value for s, value in compute_similarities(X_TF, Qx_TK, Qy_TL).items()}


def compute_block_dissimilarities(outputs: list[Tensor]) -> dict[Summary, list[float]]:
    """Return 1 - mean similarity of each view (tokens, width) to all others; 0 for a single one."""
    others = max(len(outputs) - 1, 1)
    return {
        summary: [1.0 - float(row.sum() - 1) / others if len(outputs) > 1 else 0.0 for row in rows]
        for summary, rows in compute_pairwise_similarities(outputs).items()
    }


def pair_activations(layers: Sequence[LayerActivations]) -> list[tuple[Tensor, Tensor]]:
    """Return each input with the outputs, side by side, of the layers that read it."""
    found: list[tuple[Tensor, list[Tensor]]] = []
    for layer in layers:
        outputs = next((ys for x_TI, ys in found if torch.equal(x_TI, layer.x_TI)), None)
        if outputs is None:
            found.append((layer.x_TI, outputs := []))
        outputs.append(layer.y_TO)
    return [(x_TI, torch.cat(ys, dim=1)) for x_TI, ys in found]


class Cca(DimensionlessMetric):
    """Projection-weighted CCA."""

    needs = Needs(samples=SampleRequest(activations=COMPARED_TOKENS))
    slope_name = "1 - similarity"
    summary: ClassVar[Summary] = "pwcca"

    @classmethod
    def get_min_tokens(cls, model: LoadedModel) -> int:
        """Return ten tokens per component of the widest layer."""
        widest = max(max(layer.shape) for unit in model.units for layer in unit.layers)
        return count_tokens_needed(widest)

    def measure_slope(self, view: UnitView) -> float:
        """Return 1 - similarity of input and output, averaged over the inputs that a unit reads."""
        means = view.memo.get("cca", lambda: self._average_inputs(view))
        self.facts[view.unit.name] = means
        return means[self.summary]

    def _average_inputs(self, view: UnitView) -> dict[Summary, float]:
        pairs = pair_activations(view.activations)
        scores = [self._compare(view, *pair) for pair in pairs]
        return {s: sum(score[s] for score in scores) / len(scores) for s in SUMMARIES}

    def _compare(self, view: UnitView, x_TI: Tensor, y_TO: Tensor) -> dict[Summary, float]:
        components = min(COMPONENTS, len(x_TI) // LEAST_PER_COMPONENT)
        if components < min(COMPONENTS, *x_TI.shape[1:]):
            message = f"only {len(x_TI)} tokens reach it: {components} components compared"
            self.context.emit(Notice(kind="warning", subject=view.unit.name, message=message))
        if components == 0:
            return dict.fromkeys(SUMMARIES, 0.0)
        device = self.context.model.device
        return compute_dissimilarities(x_TI.to(device), y_TO.to(device), components=components)

    def aggregate_blocks(self, per_unit: Mapping[str, float]) -> dict[int, float]:
        """Return each block's dissimilarity to all other blocks."""
        assert self.context.samples is not None
        outputs = self.context.samples.block_outputs
        found = self.context.memo.get("cca", lambda: compute_block_dissimilarities(outputs))
        return dict(enumerate(found[self.summary]))

    def collect_details(self) -> dict[str, Any]:
        """Return all summaries of every unit."""
        return {
            "summary": self.summary,
            "components": COMPONENTS,
            "dissimilarity": self.facts,
        }


class CcaSvcca(Cca):
    """The plain mean of the correlations."""

    summary = "svcca"


class CcaFirst(Cca):
    """The first correlation alone."""

    summary = "first"
