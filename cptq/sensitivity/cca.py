"""`cca` (CMPQ): how little of what comes in can be found in what goes out.

    s = 1 - similarity(input, output)       projection-weighted CCA (cptq.numerics.subspace)

per unit between a linear's input and its output (a fused group's outputs side by side), and per
block, as in the paper (CPTQuant, arXiv 2412.03599, CMPQ), 1 - the mean similarity of the block's
output to the outputs of all other blocks. On tokens, padding left out; the paper's code takes
mean-pooled texts with padding and only the first correlation, which saturates near 1.

Three metrics differ in the mean of the correlations that makes the similarity: `cca` weights them
by projection (PWCCA), `cca-svcca` takes the plain mean (SVCCA), `cca-first` the first alone (the
paper's). All three come from one decomposition and stand side by side in the details.

Scores come from s by `cptq.sensitivity.relative`: s (n_u / n) t^2.

Cost: a forward pass, two bases per unit and one per block (`cptq.numerics.subspace`). Limits: s
says how a unit's dominant subspaces turn, not what an error in them costs; nothing after the unit
is looked at. It is here because the paper proposes it: look at its rank correlation with `kl`
before relying on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from cptq.calibration.samples import Wants
from cptq.checkpoint.model import LoadedModel
from cptq.numerics.subspace import (
    COMPONENTS,
    SUMMARIES,
    TOKENS_PER_COMPONENT,
    Summary,
    pairwise_similarities,
    principal_basis,
    similarities,
    tokens_needed,
)
from cptq.sensitivity.metric import Context, Needs, UnitView
from cptq.sensitivity.relative import Relative
from cptq.types import Notice

#: token rows compared
COMPARED = TOKENS_PER_COMPONENT * COMPONENTS


def dissimilarities(X_TF: Tensor, Y_TG: Tensor, *, components: int) -> dict[Summary, float]:
    """1 - the similarity of two views of the same tokens, in [0, 1], by each summary."""
    Qx_TK = principal_basis(X_TF, components=components)
    Qy_TL = principal_basis(Y_TG, components=components)
    return {s: 1.0 - alike for s, alike in similarities(X_TF, Qx_TK, Qy_TL).items()}


def block_dissimilarities(outputs: list[Tensor]) -> dict[Summary, list[float]]:
    """1 - mean similarity of each view (tokens, width) to all the others; 0 for a single one."""
    others = max(len(outputs) - 1, 1)
    return {
        summary: [1.0 - float(row.sum() - 1) / others if len(outputs) > 1 else 0.0 for row in alike]
        for summary, alike in pairwise_similarities(outputs).items()
    }


class Cca(Relative):
    """Projection-weighted CCA."""

    needs = Needs(samples=Wants(views=COMPARED))
    of = "1 - similarity"
    summary: ClassVar[Summary] = "pwcca"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._summaries: dict[str, dict[Summary, float]] = {}

    @classmethod
    def least_tokens(cls, model: LoadedModel) -> int:
        """Ten per component of the widest layer."""
        widest = max(max(layer.shape) for unit in model.units for layer in unit.layers)
        return tokens_needed(widest)

    def slope(self, view: UnitView) -> float:
        """1 - similarity of input and output; averaged where a unit's layers read other inputs."""
        means = view.memo.get("cca", lambda: self._all(view))
        self._summaries[view.unit.name] = means
        return means[self.summary]

    def _all(self, view: UnitView) -> dict[Summary, float]:
        scores = [self._of_input(view, *both) for both in self._views(view)]
        return {s: sum(score[s] for score in scores) / len(scores) for s in SUMMARIES}

    def _views(self, view: UnitView) -> list[tuple[Tensor, Tensor]]:
        """What goes in, and side by side what comes out of the layers that read it."""
        assert self.context.samples is not None
        found: list[tuple[Tensor, list[Tensor]]] = []
        for spec in view.unit.layers:
            layer = self.context.samples.views[spec.name]
            outputs = next((ys for x_TI, ys in found if torch.equal(x_TI, layer.x_TI)), None)
            if outputs is None:
                found.append((layer.x_TI, outputs := []))
            outputs.append(layer.y_TO)
        return [(x_TI, torch.cat(ys, dim=1)) for x_TI, ys in found]

    def _of_input(self, view: UnitView, x_TI: Tensor, y_TO: Tensor) -> dict[Summary, float]:
        components = min(COMPONENTS, len(x_TI) // TOKENS_PER_COMPONENT)
        if components < min(COMPONENTS, *x_TI.shape[1:]):
            message = f"only {len(x_TI)} tokens reach it: {components} components compared"
            self.context.emit(Notice(kind="warning", subject=view.unit.name, message=message))
        if components == 0:
            return dict.fromkeys(SUMMARIES, 0.0)
        device = self.context.model.device
        return dissimilarities(x_TI.to(device), y_TO.to(device), components=components)

    def per_block(self, per_unit: Mapping[str, float]) -> dict[int, float]:
        """Each block's output against those of all other blocks."""
        samples = self.context.samples
        assert samples is not None
        found = self.context.memo.get("cca", lambda: block_dissimilarities(samples.blocks))
        return dict(enumerate(found[self.summary]))

    def details(self) -> dict[str, Any]:
        """What each summary says of each unit."""
        return {
            "summary": self.summary,
            "components": COMPONENTS,
            "dissimilarity": self._summaries,
        }


class CcaSvcca(Cca):
    """The plain mean of the correlations."""

    summary = "svcca"


class CcaFirst(Cca):
    """The first correlation alone."""

    summary = "first"
