"""What `compress --tune` may change: the scales of compressed linears, norms and biases.

Each is a parameter with a relative change r, which `compression.tune` moves: s = s_0 e^r for
scales, v = v_0 + rms(v_0) r for vectors. W = (q - z) s is linear in s, so with codes q and zero
points z as they are the gradient by a scale is a sum over its group,

    dL/ds = sum over the group of (q - z) dL/dW.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import TORCH_DTYPES, set_weight
from cptq.compression.layer import round_layer_scales
from cptq.numerics.grid import dequantize_layer
from cptq.types import CompressedLayer

#: size of a step of Adam at the beginning, as a share of the relative error of the weights, by what
#: an output row is; a step has hundreds of tokens, but few sentences, and more noise
RATES = {"token": 0.07, "sentence": 0.02, "example": 0.02}
#: inputs of a layer up to which that holds; with more, the rate falls with their number
WIDTH = 64


def list_free(
    model: LoadedModel, layers: Sequence[CompressedLayer], float16_scales: bool, rate: float
) -> list[Free]:
    """Return all that may move.

    Args:
        model: computes with the layers.
        layers: the compressed linears.
        float16_scales: as in `compress_layer`.
        rate: an entry of `RATES`.
    """
    rates = [
        rate * math.sqrt(x.result.weight_error) * min(1.0, WIDTH / x.spec.shape[1]) for x in layers
    ]
    mean, vectors = sum(rates) / len(rates), find_free_vectors(model).items()
    return [
        *(Scales(model, x, float16_scales, r) for x, r in zip(layers, rates, strict=True)),
        *(Vector(model, name, vector, mean) for name, vector in vectors),
    ]


def find_free_vectors(model: LoadedModel) -> dict[str, nn.Parameter]:
    """Return the weights of norms and the biases, by the names that they are stored under."""
    stored = {spec.name for spec in model.tensors}
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, vector in model.module.named_parameters(remove_duplicate=False):
        named = name.rpartition(".")[2] in ("weight", "bias")
        if named and vector.dim() == 1 and vector.is_floating_point() and name in stored:
            found.setdefault(id(vector), (name, vector))
    return dict(found.values())


class Free:
    """Something that may move, by a relative change `r` with a gradient of its own.

    `name`: of the dense tensor, if it is one.
    """

    name: str | None = None

    def __init__(self, parameter: nn.Parameter, shape: torch.Size, rate: float) -> None:
        self.parameter, self.rate = parameter, rate
        self.r = torch.zeros(shape, device=parameter.device)

    def receive(self, gradient: Tensor) -> None:
        """Turn the gradient of the model's parameter into that of `r`."""
        raise NotImplementedError

    def store(self, change: Tensor) -> Tensor:
        """Return the value as it would be stored after a change like `r`."""
        raise NotImplementedError

    def load(self, value: Tensor) -> None:
        """Let the model compute with a stored value."""
        raise NotImplementedError


class Scales(Free):
    """The scales of one compressed linear: s = s_0 e^r."""

    def __init__(
        self, model: LoadedModel, layer: CompressedLayer, float16_scales: bool, rate: float
    ) -> None:
        self._module = model.linear(layer.spec.name)
        weight = self._module.weight
        assert isinstance(weight, nn.Parameter)
        super().__init__(weight, layer.scale.shape, rate)
        self.layer = layer
        self._start_OG = layer.scale.float()
        self._dtype, self._float16_scales = model.dtype, float16_scales

    def receive(self, gradient: Tensor) -> None:
        gradient_OI = gradient.T if isinstance(self._module, Conv1D) else gradient
        slope_OG = fold_gradient(self.layer, gradient_OI)
        self.r.grad = slope_OG.mul_(self._start_OG * self.r.exp())

    def store(self, change: Tensor) -> Tensor:
        scale_OG = self._start_OG * change.exp()
        return round_layer_scales(self.layer, scale_OG, float16_scales=self._float16_scales)

    def load(self, value: Tensor) -> None:
        self.layer = replace(self.layer, scale=value)
        set_weight(self._module, dequantize_layer(self.layer, self._dtype))


class Vector(Free):
    """A norm's weight or a bias: v = v_0 + rms(v_0) r."""

    def __init__(self, model: LoadedModel, name: str, vector: nn.Parameter, rate: float) -> None:
        super().__init__(vector, vector.shape, rate)
        self.name = name
        self._start = vector.detach().float().clone()
        self._size = float(self._start.square().mean().sqrt())
        stored = next(spec.dtype for spec in model.tensors if spec.name == name)
        self._dtype = TORCH_DTYPES[stored]

    def receive(self, gradient: Tensor) -> None:
        self.r.grad = gradient.float() * self._size

    def store(self, change: Tensor) -> Tensor:
        return (self._start + self._size * change).to(self._dtype)

    def load(self, value: Tensor) -> None:
        self.parameter.data.copy_(value)


def fold_gradient(layer: CompressedLayer, gradient_OI: Tensor) -> Tensor:
    """Return the gradient by the scales (out, groups), float32, from that by the weight."""
    ones_OG = torch.ones_like(layer.scale, dtype=torch.float32)
    steps_OI = dequantize_layer(replace(layer, scale=ones_OG), torch.float32)
    return steps_OI.mul_(gradient_OI).view(*layer.scale.shape, -1).sum(-1)
