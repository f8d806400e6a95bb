"""Rules of activation sparsity in the `packed` format: labels, and the tensors of each. No torch.

A rule says which inputs x_j of a linear (out, in) are multiplied, token by token:

| label      | drops                                 | tensors                               |
|------------|---------------------------------------|---------------------------------------|
| zeros      | x_j = 0, which changes nothing        |                                       |
| value      | |x_j| <= t                            | activation_threshold (1,)             |
| channel    | |x_j| <= t_j                          | activation_threshold (in,)            |
| spread     | |x_j| <= mean + t deviations of |x|   | activation_threshold (1,)             |
| gate-F     | outputs y_i with |F(y_i)| <= t_i      | activation_threshold (out,)           |
| low-rank-R | |x_j| <= t, for which B A stands      | activation_threshold (1,),            |
|            |                                       | activation_left B (out, R),           |
|            |                                       | activation_right A (R, in)            |

Thresholds are float32, A and B float16. F is the function that the model applies to the outputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from cptq.layouts.interface import Layout
from cptq.types import Candidate, LayerSpec, TensorSpec

THRESHOLD, LEFT, RIGHT = "activation_threshold", "activation_left", "activation_right"
#: all tensors that a rule may have
PARTS = (THRESHOLD, LEFT, RIGHT)
#: functions that a gate's outputs may pass: those with F(0) = 0
GATE_FUNCTIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
_LABEL = re.compile(rf"zeros|value|channel|spread|gate-({'|'.join(GATE_FUNCTIONS)})|low-rank-(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleKind:
    """A label, read: `function` of a gate, `rank` of a low-rank part."""

    kind: str
    function: str = ""
    rank: int = 0

    @property
    def drops_inputs(self) -> bool:
        """Whether it is inputs that are dropped, and not outputs."""
        return self.kind != "gate"


def parse_rule(label: str) -> RuleKind:
    """Read a label.

    Raises:
        ValueError: it is none.
    """
    match = _LABEL.fullmatch(label)
    if match is None:
        raise ValueError(f"{label!r} is not a rule of activation sparsity")
    if match[1]:
        return RuleKind(kind="gate", function=match[1])
    if match[2]:
        return RuleKind(kind="low-rank", rank=int(match[2]))
    return RuleKind(kind=label)


def list_rule_tensors(name: str, shape: tuple[int, int], label: str) -> tuple[TensorSpec, ...]:
    """Return the tensors of a rule of the linear `name` (out, in); none for an empty label."""
    if not label:
        return ()
    rule, (out, inputs) = parse_rule(label), shape
    lengths = {"value": 1, "spread": 1, "low-rank": 1, "channel": inputs, "gate": out}
    if rule.kind not in lengths:
        return ()
    parts = [TensorSpec(name=f"{name}.{THRESHOLD}", dtype="F32", shape=(lengths[rule.kind],))]
    if rule.rank:
        parts.append(TensorSpec(name=f"{name}.{LEFT}", dtype="F16", shape=(out, rule.rank)))
        parts.append(TensorSpec(name=f"{name}.{RIGHT}", dtype="F16", shape=(rule.rank, inputs)))
    return tuple(parts)


class RuledLayout:
    """A layout whose packed layers have the tensors of their rules besides.

    Args:
        layout: that of the weights.
        rules: {layer: label}.
    """

    def __init__(self, layout: Layout, rules: Mapping[str, str]) -> None:
        self.name, self._layout, self._rules = layout.name, layout, rules

    def explain_refusal(self, layer: LayerSpec, candidate: Candidate) -> str | None:
        """Return what the layout of the weights says."""
        return self._layout.explain_refusal(layer, candidate)

    def tensors(self, layer: LayerSpec, candidate: Candidate) -> tuple[TensorSpec, ...]:
        """Return the tensors of the weight, then those of the rule."""
        label = self._rules.get(layer.name, "")
        own = list_rule_tensors(layer.name, layer.shape, label)
        return (*self._layout.tensors(layer, candidate), *own)
