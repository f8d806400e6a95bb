"""`chess`: a threshold for every channel of the gate, and of attention for queries and outputs.

A gated feed-forward layer is W_down (a * u), a = F(W_gate x), u = W_up x. Channel i goes where

    |a_i| E|u_i| <= t,      that is |a_i| <= t / E|u_i|

with t the p-quantile of |a_i| E|u_i| on the calibration tokens: a_i is known before u_i, whose
expected size stands for it. Then neither row i of W_up nor column i of W_down is needed. In
attention the inputs of the query and of the output projection are dropped where |x_j| <= t; keys
and values, which stay in the cache, see all inputs.

Source: CHESS (He et al., arXiv 2409.01366): channel-wise thresholding and selective sparsification;
formulas as in its code (thresholds.py, models/llama.py).

Departures: thresholds are quantiles over all calibration tokens together, its code averages those
of samples; and they are fitted behind blocks that already drop inputs. Cost: a threshold of 4 bytes
per channel in the file. Limits: gated layers whose gate is a linear of its own; all rows of W_up
are multiplied here, so that only W_down has fewer inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cptq.activation_sparsity.method import BlockView, Method, Rules
from cptq.activation_sparsity.teal import build_threshold
from cptq.errors import UsageError
from cptq.layouts.activations import GATE_FUNCTIONS, THRESHOLD
from cptq.numerics.activation_rules import FUNCTIONS, find_quantile
from cptq.types import ActivationRule, LayerSpec

#: roles of the linears of attention that see fewer inputs
ATTENTION = ("q", "o")


def list_rules(layers: Sequence[LayerSpec], function: str) -> Mapping[str, str]:
    """Return the rules of gates, last linears, queries and outputs.

    Raises:
        UsageError: the model has no gated layer, or another function than these.
    """
    labels = {"gate": f"gate-{function}", "down": "zeros"} | dict.fromkeys(ATTENTION, "value")
    roles = {spec.role for spec in layers}
    if not {"gate", "up", "down"} <= roles or function not in GATE_FUNCTIONS:
        raise UsageError(
            "--activation-sparsity chess needs feed-forward layers with linears gate, up and down, "
            f"and this model has {', '.join(sorted(roles)) or 'no linears'}",
            allowed="another method such as teal:50%",
        )
    return {spec.name: labels[spec.role] for spec in layers if spec.role in labels}


def fit(view: BlockView) -> Rules:
    """Return the thresholds of a block."""
    by_role = {spec.role: spec.name for spec in view.layers}
    rules: dict[str, ActivationRule] = {}
    for name, label in view.labels.items():
        if label == "value":
            rules[name] = build_threshold(find_quantile(view.inputs[name].abs(), view.share))
        elif label == "zeros":
            rules[name] = ActivationRule(label=label, tensors={})
        else:
            rules[name] = _fit_gate(view, name, by_role["up"], label)
    return rules


def _fit_gate(view: BlockView, gate: str, up: str, label: str) -> ActivationRule:
    x_TI = view.inputs[gate]
    function = FUNCTIONS[label.removeprefix("gate-")]
    size_TF = function(view.multiply(gate, x_TI)).abs()
    expected_F = view.multiply(up, x_TI).abs().mean(dim=0).clamp_min(1e-30)
    limit_F = find_quantile(size_TF * expected_F, view.share) / expected_F
    return ActivationRule(label=label, tensors={THRESHOLD: limit_F})


METHOD = Method(list_rules=list_rules, fit=fit)
