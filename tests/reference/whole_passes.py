"""Passes through a whole model at once, with hooks on every linear: what block by block must equal.

Everything is kept, all layers at a time, in the model's own type.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cptq.calibration.objective import Objective, mask_real_tokens
from cptq.checkpoint.model import LoadedModel

Batches = Sequence[Mapping[str, Tensor]]


@dataclass
class Seen:
    """What one linear read and what came back to it: a row per token that is not padding."""

    x: list[Tensor] = field(default_factory=list)
    g: list[Tensor] = field(default_factory=list)
    seen: int = 0

    @property
    def moment(self) -> Tensor:
        """Mean of x x^T, in float64."""
        rows = torch.cat(self.x).double()
        return rows.T @ rows / len(rows)


def sample_linears(
    model: LoadedModel, batches: Batches, objective: Objective, seed: int
) -> tuple[dict[str, Seen], int]:
    """Return all that flows through the linears of the units, and the rows of the model's output.

    A linear that never runs is left out. An input of another length than the batch has tokens (an
    expert's) is kept whole.
    """
    module = copy.deepcopy(model.module).requires_grad_(True)
    found: dict[str, Seen] = defaultdict(Seen)
    generator = torch.Generator().manual_seed(seed + 1)
    count = 0
    for batch in batches:
        calls: list[tuple[str, Tensor, Tensor]] = []
        handles = [
            module.get_submodule(spec.name).register_forward_hook(_watch(spec.name, calls))
            for unit in model.units
            for spec in unit.layers
        ]
        z = objective.select_rows(_run(model, module, batch), batch)
        for handle in handles:
            handle.remove()
        z.backward(objective.draw_direction(z, generator))
        count += len(z)
        mask = mask_real_tokens(batch).flatten()
        for name, x, y in calls:
            rows, back = x.detach().reshape(-1, x.shape[-1]), y.grad.reshape(-1, y.shape[-1])
            if len(rows) == len(mask):
                rows, back = rows[mask], back[mask]
            found[name].x.append(rows)
            found[name].g.append(back)
            found[name].seen += len(rows)
    return dict(found), count


def _watch(name: str, calls: list[tuple[str, Tensor, Tensor]]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        calls.append((name, args[0], output))

    return hook


def move_all(
    model: LoadedModel, batches: Batches, objective: Objective, weights: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], float]:
    """Return the gradient (out, in) by every weight where all of `weights` are in place together,
    of the mean divergence from the dense model, and that divergence.
    """
    moved = copy.deepcopy(model.module).requires_grad_(True)
    with torch.no_grad():
        for name, W_OI in weights.items():
            part = moved.get_submodule(name)
            part.weight.copy_(W_OI.T if isinstance(part, Conv1D) else W_OI)
    total, count = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            dense = objective.compute_reference(
                objective.select_rows(_run(model, model.module, batch), batch)
            )
        z = objective.select_rows(_run(model, moved, batch), batch)
        z.backward(objective.compute_gradient(dense, z))
        total += float(objective.compute_divergence(dense, z.detach()).sum())
        count += len(z)
    gradients = {}
    for name in weights:
        part = moved.get_submodule(name)
        if part.weight.grad is not None:
            g = part.weight.grad / count
            gradients[name] = g.T if isinstance(part, Conv1D) else g
    return gradients, total / count


def _run(model: LoadedModel, module: nn.Module, batch: Mapping[str, Tensor]) -> object:
    extra = {"use_cache": False} if model.kind == "causal-lm" else {}
    return module(**batch, **extra)
