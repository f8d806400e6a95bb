"""Drop inputs of a linear by a rule, token by token, and make up for it where the rule does.

    y = W (m * x)          m_j = 0 where |x_j| <= threshold
    value                  one threshold t
    channel                one threshold per input, t_j
    spread                 mean_j |x_j| + t std_j |x_j|, of the token's own inputs
    low-rank               one threshold, and y = W (m * x) + B A ((1 - m) * x)
    gate                   y = m * (W x), m_i = 0 where |F(y_i)| <= t_i

Sources: TEAL (value), CHESS (channel, gate), Spark Transformer (spread), R-Sparse (low-rank); see
`cptq.activation_sparsity`, which fits the tensors. The labels are those of
`cptq.layouts.activations`. Cost: a comparison and a product per input; of `spread` two sums; of
`low-rank` two products with the rank. An x_j that is not a number is kept, so that it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from cptq.layouts.activations import LEFT, RIGHT, THRESHOLD, RuleKind

Tensors = Mapping[str, Tensor]

_tanh_gelu = partial(functional.gelu, approximate="tanh")
FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": functional.relu,
}


def find_dropped(rule: RuleKind, tensors: Tensors, x: Tensor) -> Tensor:
    """Return which of the inputs x (..., in) a rule drops, bool of the same shape.

    Of `zeros` these are the zeros; of a gate, which drops outputs, none.
    """
    if rule.kind == "gate":
        return torch.zeros_like(x, dtype=torch.bool)
    if rule.kind == "zeros":
        return x == 0
    size = x.abs().float()
    threshold = tensors[THRESHOLD]
    if rule.kind == "spread":
        threshold = size.mean(-1, True) + threshold * size.std(-1, correction=0, keepdim=True)
    return size <= threshold


def drop_inputs(rule: RuleKind, tensors: Tensors, x: Tensor) -> Tensor:
    """Return x with 0 in place of what the rule drops; x itself where that changes nothing."""
    if rule.kind in ("gate", "zeros"):
        return x
    return x.masked_fill(find_dropped(rule, tensors, x), 0.0)


def finish_outputs(rule: RuleKind, tensors: Tensors, x: Tensor, kept: Tensor, y: Tensor) -> Tensor:
    """Return the outputs y (..., out) of a linear on `kept`, as the rule has them.

    `x`: the inputs before `drop_inputs`.
    """
    if rule.kind == "low-rank":
        A_RI, B_OR = tensors[RIGHT].to(x.dtype), tensors[LEFT].to(x.dtype)
        return y + ((x - kept) @ A_RI.T) @ B_OR.T
    if rule.kind == "gate":
        size = FUNCTIONS[rule.function](y).abs().float()
        return y.masked_fill(size <= tensors[THRESHOLD], 0.0)
    return y


def find_quantile(values: Tensor, share: float) -> float:
    """Return the largest of the smallest `share` of values (rounded); 0 where that is none.

    So dropping what is at most that drops the share, and more where values are equal.
    """
    flat = values.reshape(-1).float()
    count = round(share * flat.numel())
    return float(flat.kthvalue(count).values) if count else 0.0
