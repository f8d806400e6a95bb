"""`wina`: drop the inputs for which |x_j| |W_:j| is small, with one threshold per linear.

    keep x_j where |x_j| c_j > t,      c_j = |W_:j|_2,      t the p-quantile of |x_j| c_j

Stored as a threshold for each input, t / c_j, so that nothing but a comparison remains at run time.

Source: WINA (Chen et al., arXiv 2505.19427), which keeps the K largest of a token; its code offers
thresholds (`mask_by`) besides, as TEAL has them, which are taken here: the work of a token then
follows its inputs, and no selection is needed.

Departures: c_j is that of the compressed weight, and of every linear (the code takes 1 for the
second and later matrices of a layer, whose columns it turns orthogonal beforehand; without that
transformation the bound of the paper holds for one linear, not for the network). Every linear gets
the same p. Cost: a threshold of 4 bytes per input in the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cptq.activation_sparsity.method import BlockView, Method, Rules
from cptq.layouts.activations import THRESHOLD
from cptq.numerics.activation_rules import find_quantile
from cptq.types import ActivationRule, LayerSpec


def list_rules(layers: Sequence[LayerSpec], _function: str) -> Mapping[str, str]:
    """Return a threshold per input for every linear."""
    return {spec.name: "channel" for spec in layers}


def fit(view: BlockView) -> Rules:
    """Return the thresholds; an input whose column is 0 is dropped always."""
    rules = {}
    for name, x_TI in view.inputs.items():
        norm_I = view.get_weight(name).norm(dim=0)
        threshold = find_quantile(x_TI.abs() * norm_I, view.share)
        # 0 / 0 where the threshold is 0, too
        limit_I = (threshold / norm_I).masked_fill(norm_I == 0, float("inf"))
        rules[name] = ActivationRule(label="channel", tensors={THRESHOLD: limit_I})
    return rules


METHOD = Method(list_rules=list_rules, fit=fit)
