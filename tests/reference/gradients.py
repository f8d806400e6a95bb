"""Whole models in float64, pass by pass: what trials and gradients must agree with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cptq.calibration.objective import Objective
from cptq.checkpoint.model import LoadedModel

Rows = Sequence[Mapping[str, Tensor]]


def divergence(objective: Objective, dense: Tensor, other: Tensor) -> Tensor:
    """Mean distance of the rows of two answers, by the textbook formula, differentiable."""
    if objective.form == "values":
        pairs = zip(dense, other, strict=True)
        return torch.stack([((a - b) ** 2).sum() / 2 for a, b in pairs]).mean()
    terms = []
    for a, b in zip(dense, other, strict=True):
        p, q = torch.softmax(a, 0), torch.softmax(b, 0)
        terms.append((p * (p.log() - q.log())).sum())
    return torch.stack(terms).mean()


def answers(model: LoadedModel, module: nn.Module, rows: Rows, objective: Objective) -> Tensor:
    """All rows of the answer of `module`, a variant of the model."""
    extra = {"use_cache": False} if model.kind == "causal-lm" else {}
    return torch.cat([objective.select_rows(module(**row, **extra), row) for row in rows])


def judged(model: LoadedModel, module: nn.Module, rows: Rows, objective: Objective) -> Tensor:
    """The rows that judge: of language models every second position of windows of 16 and more."""
    if objective.kind not in ("causal-lm", "masked-lm"):
        return answers(model, module, rows, objective)
    extra = {"use_cache": False} if model.kind == "causal-lm" else {}
    found = []
    for row in rows:
        logits_BTV = module(**row, **extra).logits
        step = 2 if logits_BTV.shape[1] >= 16 else 1
        mask_BT = row.get("attention_mask", torch.ones_like(row["input_ids"])).bool()
        found.append(logits_BTV[:, step - 1 :: step][mask_BT[:, step - 1 :: step]])
    return torch.cat(found)


def double(model: LoadedModel) -> nn.Module:
    """The model's module in float64."""
    return copy.deepcopy(model.module).double()


def changed(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy with other weights, layer name -> W_OI."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for name, W_OI in weights.items():
            other.get_submodule(name).weight.copy_(W_OI.double())
    return other


def trial(
    model: LoadedModel, rows: Rows, objective: Objective, weights: Mapping[str, Tensor]
) -> float:
    """Divergence of the model with other weights from the dense one."""
    module = double(model)
    with torch.no_grad():
        dense = judged(model, module, rows, objective)
        other = judged(model, changed(module, weights), rows, objective)
        return float(divergence(objective, dense, other))


def disturbed_trial(
    model: LoadedModel,
    rows: Rows,
    objective: Objective,
    modules: Sequence[str],
    disturb: Callable[[Tensor, int], Tensor],
) -> float:
    """Divergence with what some linears or blocks read replaced by disturb(x, index of the batch).

    x is the first argument: of a block the hidden state that enters it.
    """
    module = double(model)
    with torch.no_grad():
        dense = judged(model, module, rows, objective)
        other = []
        for index, row in enumerate(rows):
            variant = copy.deepcopy(module)
            for name in modules:
                inner = variant.get_submodule(name)
                inner.forward = _reading(inner.forward, disturb, index)  # type: ignore[method-assign]
            other.append(judged(model, variant, [row], objective))
        return float(divergence(objective, dense, torch.cat(other)))


def _reading(
    run: Callable[..., Any], disturb: Callable[[Tensor, int], Tensor], index: int
) -> Callable[..., Any]:
    return lambda x, *rest, **more: run(disturb(x, index), *rest, **more)


def gradients(
    model: LoadedModel, rows: Rows, objective: Objective, weights: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], float]:
    """Gradient of the divergence by each of `weights`, taken where they stand, and its value."""
    module = double(model)
    with torch.no_grad():
        dense = answers(model, module, rows, objective)
    there = changed(module, weights).requires_grad_(True)
    loss = divergence(objective, dense, answers(model, there, rows, objective))
    loss.backward()
    found = {name: there.get_submodule(name).weight.grad for name in weights}
    return found, float(loss.detach())
