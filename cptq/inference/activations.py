"""Activation sparsity of packed linears: multiply by a rule, count what it drops, switch it off.

A packed linear that has a rule (`cptq.numerics.activation_rules`) multiplies by `multiply`. The
environment variable CPTQ_ACTIVATION_SPARSITY=off, `set_enabled(False)` or a `with` block of
`without_activation_sparsity()` turn all rules of the process off: the model then computes, bit by
bit, what it computes without rules. `count_dropped()` counts while it is entered.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from cptq.layouts.activations import RuleKind
from cptq.numerics.activation_rules import Tensors, drop_inputs, find_dropped, finish_outputs

_enabled = os.environ.get("CPTQ_ACTIVATION_SPARSITY", "") != "off"
#: what is counting at present
_counting: list[DroppedInputs] = []


class DroppedInputs:
    """Inputs that rules dropped, and all that they saw, each times the outputs that it feeds."""

    def __init__(self) -> None:
        self.dropped = self.total = 0

    @property
    def share(self) -> float:
        """The share of products that is not needed; 0 where no rule was met."""
        return self.dropped / self.total if self.total else 0.0


def is_enabled() -> bool:
    """Return whether rules are applied."""
    return _enabled


def set_enabled(enabled: bool) -> None:
    """Apply rules, or leave them out, in the whole process."""
    global _enabled
    _enabled = enabled


@contextmanager
def without_activation_sparsity() -> Iterator[None]:
    """Leave rules out for the time of a `with` block, in all threads."""
    before = is_enabled()
    set_enabled(False)
    try:
        yield
    finally:
        set_enabled(before)


@contextmanager
def count_dropped() -> Iterator[DroppedInputs]:
    """Count what all rules drop for the time of a `with` block."""
    found = DroppedInputs()
    _counting.append(found)
    try:
        yield found
    finally:
        _counting.remove(found)


def multiply(
    rule: RuleKind, tensors: Tensors, x: Tensor, linear: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return `linear` of x (..., in) by the rule, (..., out)."""
    kept = drop_inputs(rule, tensors, x)
    y = linear(kept)
    if _counting and rule.drops_inputs:
        dropped = int(find_dropped(rule, tensors, x).sum())
        for found in _counting:
            found.dropped += dropped * y.shape[-1]
            found.total += x.numel() * y.shape[-1]
    return finish_outputs(rule, tensors, x, kept, y)
