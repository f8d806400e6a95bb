"""The slow truth of tuning: float64, autograd through codes times scales and the plain KL."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cptq.calibration.batches import Batch
from cptq.calibration.objective import Objective
from cptq.types import CompressedLayer


def multiply_out(layer: CompressedLayer, scale_OG: Tensor) -> Tensor:
    """The weight of a layer at other scales, one group after the other."""
    size = layer.codes.shape[1] // scale_OG.shape[1]
    columns = []
    for index in range(layer.codes.shape[1]):
        group = index // size
        step = layer.codes[:, index].double()
        if layer.zero is not None:
            step = step - layer.zero[:, group].double()
        if layer.mask is not None:
            step = step * layer.mask[:, index]
        columns.append(step * scale_OG[:, group])
    return torch.stack(columns, 1)


def differentiate(
    student: nn.Module,
    dense: nn.Module,
    layers: list[CompressedLayer],
    names: list[str],
    batch: Batch,
    objective: Objective,
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the summed divergence by the scales of layers and by named parameters."""
    exact, target = copy.deepcopy(student).double(), copy.deepcopy(dense).double()
    scales = [layer.scale.double().requires_grad_() for layer in layers]
    own = dict(exact.named_parameters(remove_duplicate=False))
    vectors = [own[name].detach().clone().requires_grad_() for name in names]
    values = dict(zip(names, vectors, strict=True))
    for layer, scale_OG in zip(layers, scales, strict=True):
        W_OI = multiply_out(layer, scale_OG)
        values[layer.spec.weight_name] = W_OI.T if layer.spec.transposed else W_OI
    extra = {"use_cache": False} if objective.kind == "causal-lm" else {}
    wanted = objective.select_rows(target(**batch, **extra), batch)
    z = objective.select_rows(functional_call(exact, values, kwargs={**batch, **extra}), batch)
    if objective.form == "values":
        loss = (z - wanted).square().sum() / 2
    else:
        p = wanted.log_softmax(-1)
        loss = (p.exp() * (p - z.log_softmax(-1))).sum()
    # an encoder's pooler has no part in the sentence's embedding
    found = torch.autograd.grad(
        loss, [*scales, *vectors], allow_unused=True, materialize_grads=True
    )
    return list(found[: len(scales)]), list(found[len(scales) :])
