"""`statistical-top-k`: a token's own threshold, from mean and deviation of its inputs' sizes.

    keep x_j where |x_j| > mean_j |x_j| + z std_j |x_j|

so that about as many inputs are kept of every token, whatever its size, in linear time and without
a selection.

Source: Spark Transformer (arXiv 2506.06644), "statistical top-k": there z is the quantile of the
standard normal distribution at 1 - k/d, for values taken as normal, and what is kept is moved
towards 0 by the threshold (soft thresholding). It is trained so.

Departures, all because nothing is trained here: sizes |x_j| in place of x_j, whose small values
of both signs have to go; z is the quantile of standardised sizes on the calibration tokens, as
sizes are not normal; what is kept keeps its value. All linears get it, where the paper has it in
the feed-forward layer and in the attention's scores. Cost: two sums over the inputs of a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cptq.activation_sparsity.method import BlockView, Method, Rules
from cptq.layouts.activations import THRESHOLD
from cptq.types import ActivationRule, LayerSpec


def list_rules(layers: Sequence[LayerSpec], _function: str) -> Mapping[str, str]:
    """Return one number of deviations for every linear."""
    return {spec.name: "spread" for spec in layers}


def fit(view: BlockView) -> Rules:
    """Return the deviations above the mean that drop the share."""
    rules = {}
    for name, x_TI in view.inputs.items():
        z = find_deviations(x_TI, view.share)
        rules[name] = ActivationRule(label="spread", tensors={THRESHOLD: torch.tensor([z])})
    return rules


def find_deviations(x_TI: Tensor, share: float) -> float:
    """Return the `share`-quantile of (|x| - mean) / std, with mean and std of each token."""
    size_TI = x_TI.abs().float()
    deviation_T1 = size_TI.std(-1, correction=0, keepdim=True).clamp_min(1e-30)
    flat = ((size_TI - size_TI.mean(-1, True)) / deviation_T1).reshape(-1)
    count = max(1, round(share * flat.numel()))
    return float(flat.kthvalue(count).values)


METHOD = Method(list_rules=list_rules, fit=fit)
