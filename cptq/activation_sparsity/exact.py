"""`exact`: what ReLU leaves at 0 need not be multiplied; the result is the same.

Where the activation function is ReLU, the last linear of every feed-forward layer is marked
(`zeros`): zeros among its inputs are counted, and a kernel that can may leave out their columns.
Nothing is fitted, and no value changes.

Source: Li et al., "The Lazy Neuron Phenomenon" (arXiv 2210.06313), which finds them; that skipping
them is free is arithmetic. Cost: none. Limits: models with ReLU; see docs/sparsity.md for what
skipping is worth with packed weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cptq.activation_sparsity.method import BlockView, Method, Rules
from cptq.errors import UsageError
from cptq.types import ActivationRule, LayerSpec

#: roles of the last linear of a feed-forward layer
LAST = ("down", "fc2")
#: functions that are 0 on a half-line
ZERO_FUNCTIONS = ("relu", "relu2", "relu6")


def list_rules(layers: Sequence[LayerSpec], function: str) -> Mapping[str, str]:
    """Return `zeros` for the last linears.

    Raises:
        UsageError: the model has no ReLU, or none of these linears.
    """
    found = {spec.name: "zeros" for spec in layers if spec.role in LAST}
    if function not in ZERO_FUNCTIONS or not found:
        raise UsageError(
            f"--activation-sparsity exact skips what ReLU leaves at 0, and this model's activation "
            f"function is {function or 'not known'}",
            allowed="a model with ReLU, or another method such as teal:50%",
        )
    return found


def fit(view: BlockView) -> Rules:
    """Return the marks."""
    return {name: ActivationRule(label=label, tensors={}) for name, label in view.labels.items()}


METHOD = Method(list_rules=list_rules, fit=fit)
