"""`teal`: a threshold of |x| per linear; the share of a block is split greedily over its linears.

    y = W (x * 1[|x| > t]),      t the p-quantile of |x| on the calibration tokens

Every linear of a block begins at p = 0. Again and again the one is raised by a step whose step adds
least to the error of the block's output, per weight that need not be multiplied, until the mean of
p, weighted by the linears' weights, is the share asked for.

Source: TEAL (Liu et al., arXiv 2408.14690) and its code (greedyopt.py): block-wise greedy split, L2
error of the block's output, averaged over tokens.

Departures:
- steps are equal in p (`STEP`) and compared per weight saved; its code has steps that save equally
  many weights. So a small linear (keys, values) does not jump from none to all;
- a step is measured again only if it comes first in the order of what was measured before, and
  taken if it then still does: the same greedy choice where steps do not become cheaper, at some two
  measurements a step instead of one per linear;
- thresholds are fitted behind blocks that already drop inputs, its code fits them on the dense
  model; and all tokens are thresholded, where its evaluation leaves the first of a prompt alone.

Cost: some 2 runs of the block per step and linear, on `walk.ERROR_TOKENS` tokens: with 7 linears
and 50% about 90. Limits: inside a block, quantiles are those of inputs that nothing before them was
dropped for, so what is reached differs from what is asked by a few percent.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import torch

from cptq.activation_sparsity.method import BlockView, Method, Rules
from cptq.layouts.activations import THRESHOLD
from cptq.numerics.activation_rules import find_quantile
from cptq.types import ActivationRule, LayerSpec

#: by how much p is raised at once, and how far
STEP, MOST = 0.1, 0.95


def list_rules(layers: Sequence[LayerSpec], _function: str) -> Mapping[str, str]:
    """Return one threshold for every linear."""
    return {spec.name: "value" for spec in layers}


def fit(view: BlockView) -> Rules:
    """Return thresholds whose shares, weighted by weights, have the mean asked for."""
    return _Split(view).find()


class _Split:
    """Shares of the linears of a block, raised step by step."""

    def __init__(self, view: BlockView) -> None:
        self._view = view
        self._sizes = {name: x_TI.abs() for name, x_TI in view.inputs.items()}
        self._numel = {spec.name: spec.numel for spec in view.layers if spec.name in view.labels}
        self._budget = view.share * sum(self._numel.values())
        self._shares = dict.fromkeys(self._numel, 0.0)
        self._error = 0.0
        self._steps = 0  # taken

    def find(self) -> Rules:
        """Spend the budget."""
        waiting = [self._try(name) for name in self._numel]
        heapq.heapify(waiting)
        while waiting and self._left() > 1e-9 * self._budget:
            _, name, steps, error = heapq.heappop(waiting)
            if steps < self._steps:  # measured before the last step
                heapq.heappush(waiting, self._try(name))
                continue
            self._shares[name] += min(self._step(name), self._left() / self._numel[name])
            self._error = error
            self._steps += 1
            if self._shares[name] < MOST - 1e-9 and self._left() > 1e-9 * self._budget:
                heapq.heappush(waiting, self._try(name))
        return self._build(self._shares)

    def _left(self) -> float:
        return self._budget - sum(self._shares[name] * n for name, n in self._numel.items())

    def _step(self, name: str) -> float:
        """Return the next step of a linear; the last that is taken is cut to the budget."""
        return min(STEP, MOST - self._shares[name])

    def _try(self, name: str) -> tuple[float, str, int, float]:
        """Return the error that the next step adds per weight saved, the name, the steps taken by
        then, and the error."""
        step = self._step(name)
        error = self._view.measure_error(
            self._build(self._shares | {name: self._shares[name] + step})
        )
        return (error - self._error) / (step * self._numel[name]), name, self._steps, error

    def _build(self, shares: Mapping[str, float]) -> Rules:
        return {
            name: build_threshold(find_quantile(self._sizes[name], p)) for name, p in shares.items()
        }


def build_threshold(threshold: float) -> ActivationRule:
    """Return the rule of one threshold."""
    return ActivationRule(label="value", tensors={THRESHOLD: torch.tensor([threshold])})


METHOD = Method(list_rules=list_rules, fit=fit)
