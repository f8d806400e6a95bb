"""Second moments of a layer's inputs, a token at a time in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def naive_moment(module: nn.Module, name: str, batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Mean of x x^T over the tokens that are not padding, from whole forward passes.

    Args:
        module: the model as it is to be calibrated; left as it was.
        name: the linear whose inputs are meant.
        batches: arguments of the model, with an attention mask.
    """
    caught: list[Tensor] = []
    hook = module.get_submodule(name).register_forward_hook(
        lambda _module, args, _output: caught.append(args[0].detach())
    )
    width = module.get_submodule(name).weight.shape[1]
    total_II, count = torch.zeros(width, width, dtype=torch.float64), 0
    for batch in batches:
        caught.clear()
        with torch.no_grad():
            module(**batch)
        mask = batch["attention_mask"].flatten().bool().tolist()
        rows = caught[0].reshape(-1, width).double()
        if len(rows) != len(mask):  # an expert's: nothing says which of them are padding
            mask = [True] * len(rows)
        for row_I, real in zip(rows, mask, strict=True):
            if real:
                total_II += torch.outer(row_I, row_I)
                count += 1
    hook.remove()
    return total_II / count


def naive_cross_moment(
    dense: nn.Module, now: nn.Module, name: str, batches: Sequence[Mapping[str, Tensor]]
) -> Tensor:
    """Mean of (x - x^) x^^T: `dense` hands x to a linear, the model `now` x^."""
    width = dense.get_submodule(name).weight.shape[1]
    total_II, count = torch.zeros(width, width, dtype=torch.float64), 0
    for batch in batches:
        rows = [_read(module, name, batch).reshape(-1, width).double() for module in (dense, now)]
        mask = batch["attention_mask"].flatten().bool().tolist()
        if len(rows[0]) != len(mask):  # one row per example
            mask = [True] * len(rows[0])
        for x_I, seen_I, real in zip(*rows, mask, strict=True):
            if real:
                total_II += torch.outer(x_I - seen_I, seen_I)
                count += 1
    return total_II / count


@torch.no_grad()
def _read(module: nn.Module, name: str, batch: Mapping[str, Tensor]) -> Tensor:
    """What a linear reads in one forward pass."""
    caught: list[Tensor] = []
    hook = module.get_submodule(name).register_forward_hook(
        lambda _module, args, _output: caught.append(args[0].detach())
    )
    module(**batch)
    hook.remove()
    return caught[0]
