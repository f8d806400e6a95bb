"""Lazy neurons: the share of activations of each feed-forward layer that are 0, or nearly so.

Source: Li et al., "The Lazy Neuron Phenomenon" (arXiv 2210.06313), which counts non-zero entries
after the ReLU of the MLP, on training text and on random tokens. Here they are counted at the input
of the layer's last linear, which is that ReLU's output; in a gated layer it is gate times up, and 0
where either is. SiLU and GELU are never exactly 0: `near_zero` counts |a| of at most `NEAR` of the
token's largest, a departure.

Cost: one forward pass per text, block by block. Limits: experts are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from cptq.calibration.batches import Batch
from cptq.calibration.block_chain import BlockChain
from cptq.calibration.objective import mask_real_tokens
from cptq.checkpoint.model import LoadedModel
from cptq.numerics.contributions import count_small
from cptq.types import LayerSpec

#: share of a token's largest |a| up to which an activation counts as nearly 0
NEAR = 0.01
ROLES = ("down", "fc2")

Visit = Callable[[LayerSpec, Tensor], None]


def list_last_linears(model: LoadedModel) -> list[LayerSpec]:
    """Return the last linear of every feed-forward layer, experts left out."""
    return [
        spec
        for spec in model.layers
        if spec.role in ROLES and spec.block is not None and not spec.expert
    ]


@torch.no_grad()
def visit_inputs(model: LoadedModel, batches: Sequence[Batch], visit: Visit) -> None:
    """Show the inputs (tokens, features) of these linears, without padding, block by block."""
    specs = list_last_linears(model)
    masks = [mask_real_tokens(batch).flatten() for batch in batches]
    chain = BlockChain(model, batches)
    chain.embed()
    for block in range(chain.blocks):
        with ExitStack() as stack:
            for spec in (spec for spec in specs if spec.block == block):
                hook = _make_hook(spec, lambda: masks[chain.batch], visit)
                handle = model.linear(spec.name).register_forward_pre_hook(hook)
                stack.callback(handle.remove)
            for _ in chain.forward_block(block, keep=False):
                pass


def _make_hook(spec: LayerSpec, get_mask: Callable[[], Tensor], visit: Visit) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        a_TF, mask_T = args[0].detach().reshape(-1, args[0].shape[-1]), get_mask()
        visit(spec, a_TF[mask_T] if len(mask_T) == len(a_TF) else a_TF)

    return hook


def draw_random_text(batches: Sequence[Batch], vocabulary: int, seed: int) -> list[Batch]:
    """Return batches of the same shapes whose tokens are drawn uniformly from the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for batch in batches:
        ids = batch["input_ids"]
        lots = torch.randint(0, vocabulary, tuple(ids.shape), generator=generator)
        drawn.append({**batch, "input_ids": lots.to(ids.device)})
    return drawn


def count_zeros(model: LoadedModel, batches: Sequence[Batch]) -> dict[str, dict[str, float]]:
    """Return {linear: {"zero", "near_zero"}}, shares of its input."""
    counts: dict[str, list[int]] = {}

    def visit(spec: LayerSpec, a_TF: Tensor) -> None:
        found = counts.setdefault(spec.name, [0, 0, 0])
        for place, count in enumerate((*count_small(a_TF, NEAR), a_TF.numel())):
            found[place] += count

    visit_inputs(model, batches, visit)
    return {
        name: {"zero": zero / total, "near_zero": near / total}
        for name, (zero, near, total) in counts.items()
    }
