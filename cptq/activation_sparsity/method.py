"""The interface of a method, and what it sees of a block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cptq.types import ActivationRule, LayerSpec

if TYPE_CHECKING:
    from torch import Tensor

Rules = Mapping[str, ActivationRule]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockView:
    """A block whose blocks before already drop inputs, and calibration tokens that reach it.

    Attributes:
        layers: its linears that get rules, in forward order.
        labels: {linear: label of its rule}.
        inputs: {linear: its inputs (tokens, in), float32}, while nothing in the block is dropped.
        share: of the inputs that are to be dropped; 1 of a method that takes none.
        get_weight: name of a linear -> its weight (out, in), float32.
        multiply: name of a linear and inputs (tokens, in) -> its outputs (tokens, out), with bias.
        measure_error: rules -> the mean over some tokens of |h' - h|, h and h' being the block's
            output without rules and with them.
    """

    layers: Sequence[LayerSpec]
    labels: Mapping[str, str]
    inputs: Mapping[str, Tensor]
    share: float
    get_weight: Callable[[str], Tensor]
    multiply: Callable[[str, Tensor], Tensor]
    measure_error: Callable[[Rules], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to drop inputs.

    Attributes:
        list_rules: (linears of all blocks that are packed, name of the model's activation function)
            -> {linear: label}; raises `UsageError` where the model is none for the method.
        fit: the rules of a block, for each of its labels.
    """

    list_rules: Callable[[Sequence[LayerSpec], str], Mapping[str, str]]
    fit: Callable[[BlockView], Rules]
