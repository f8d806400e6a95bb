"""Find the linears whose weights a family's `_init_weights` reads by name.

transformers runs `_init_weights` on every module also when it loads a checkpoint; values that were
read from it are then left alone. Most families initialize each linear on its own, and skip one that
holds packed tensors instead of a weight. Some reach into a module's children
(`init.zeros_(module.gate.weight)`), and fail with compressed-tensors, whose linears have no weight.

Here `_init_weights` runs on a shadow of the model: the same modules, without values, and with
linears that have no weight. Whose weight is missed gets it, and the module is tried again.

Cost: a copy of the tree of modules, no weights. Limit: what such code does beside reading weights
is run on the meta device; where it fails there for another reason, nothing is found.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def list_initialized_linears(module: nn.Module) -> frozenset[str]:
    """Return the names of plain linears that stock transformers cannot load without a weight."""
    missed: set[str] = set()
    shadow = _make_shadow(module, "", missed)
    for _, part in shadow.named_modules():
        if isinstance(part, PreTrainedModel):
            for inner in part.modules():
                _initialize(part, inner, missed)
    return frozenset(missed)


class _Linear(nn.Linear):
    """A linear without a weight, until it was missed."""

    own: str
    missed: set[str]

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        if name == "weight":
            if self.own in self.missed:
                return torch.empty(self.out_features, self.in_features, device="meta")
            raise _MissedError(self.own)
        return super().__getattr__(name)


class _MissedError(AttributeError):
    """The weight of a linear was read; `name` is the linear's."""


def _make_shadow(part: nn.Module, name: str, missed: set[str]) -> nn.Module:
    """Return a copy of a tree of modules with values on the meta device."""
    shadow = part.__new__(type(part))
    shadow.__dict__ = dict(vars(part))
    for kind in ("_parameters", "_buffers"):
        values = {n: None if x is None else _empty(x) for n, x in vars(part)[kind].items()}
        shadow.__dict__[kind] = values
    if type(part) is nn.Linear:
        del shadow.__dict__["_parameters"]["weight"]
        shadow.__class__ = _Linear
        shadow.__dict__ |= {"own": name, "missed": missed}
    children = {
        own: None if child is None else _make_shadow(child, f"{name}.{own}".lstrip("."), missed)
        for own, child in vars(part)["_modules"].items()
    }
    shadow.__dict__["_modules"] = children
    return shadow


def _empty(value: Tensor) -> Tensor:
    empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty


def _initialize(model: PreTrainedModel, part: nn.Module, missed: set[str]) -> None:
    """Run `_init_weights` on a module until it reads no weight that it does not get."""
    while True:
        try:
            with torch.no_grad():
                model._init_weights(part)  # type: ignore[no-untyped-call]
        except _MissedError as error:
            missed.add(str(error))
        except Exception:  # a family's code without values can raise anything
            return
        else:
            return
