"""Modules that keep their weight packed and compute from it.

The tensors are parameters with the names of docs/format-packed.md, so state dicts, `.to(device)`
and transformers' tying of embeddings work as usual. None of them is trainable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cptq.inference import activations, compiled, operations
from cptq.inference.operations import PackedWeight
from cptq.layouts.activations import PARTS, RuleKind, list_rule_tensors, parse_rule
from cptq.layouts.packed import list_packed_tensors
from cptq.types import Candidate

#: field of a `PackedWeight` -> parameter of a module
PARAMETERS = {
    "codes": "weight",
    "scale": "weight_scale",
    "factor": "weight_factor",
    "zero": "weight_zero",
    "mask": "weight_mask",
    "pattern": "weight_pattern",
}
_NAMES = tuple(PARAMETERS.values())


class PackedModule(nn.Module):
    """Base of packed linears and embeddings: a packed weight (out, in)."""

    weight: nn.Parameter
    weight_scale: nn.Parameter
    weight_factor: nn.Parameter | None

    def __init__(self, shape: tuple[int, int], scheme: Candidate) -> None:
        super().__init__()
        self.shape, self.scheme = shape, scheme
        self.number = compiled.enroll(self)
        self._kept: tuple[list[Any], PackedWeight] | None = None
        specs = {spec.name[1:]: spec for spec in list_packed_tensors("", shape, "F32", scheme)}
        for part in PARAMETERS.values():
            spec = specs.get(part)
            if spec is None:
                self.register_parameter(part, None)
                continue
            dtype = torch.int32 if spec.dtype == "I32" else torch.get_default_dtype()
            value = torch.zeros(spec.shape, dtype=dtype)
            self.register_parameter(part, nn.Parameter(value, requires_grad=False))

    @property
    def dtype(self) -> torch.dtype:
        """The model's type, in which the weight is multiplied out."""
        return (self.weight_scale if self.weight_factor is None else self.weight_factor).dtype

    @property
    def packed(self) -> PackedWeight:
        """The weight in the form that the operations take.

        It is kept, with what backends derive from it, until a parameter has other memory or type.
        """
        kept, memory = self._kept, self._describe_memory()
        if kept is None or kept[0] != memory:
            parts = {field: self._parameters[part] for field, part in PARAMETERS.items()}
            weight = PackedWeight(scheme=self.scheme, shape=self.shape, **parts)  # type: ignore[arg-type]
            self._kept = kept = memory, weight
        return kept[1]

    def _describe_memory(self) -> list[Any]:
        """Return what changes when a parameter is replaced, moved or converted."""
        found: list[Any] = []
        for part in _NAMES:
            value = self._parameters[part]
            if value is not None:
                found += (id(value), value.data_ptr(), value.dtype)
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without what is kept, which points into memory."""
        return self.__dict__ | {"_kept": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is a module of its own."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.number = compiled.enroll(self)

    def compute(self, x: Tensor) -> Tensor:
        """Map an input outside of `torch.compile`."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the dense weight (out, in)."""
        return operations.dequantize(self.packed, dtype)

    def make_dense(self, dtype: torch.dtype) -> nn.Module:
        """Return the dense module that this one replaces."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.shape[1]}, {self.shape[0]}, {self.scheme.label}"


class PackedLinear(PackedModule):
    """A linear layer, or a Conv1D of GPT-2: x W^T + b with W (out, in) packed.

    Args:
        shape: (out, in), also for a Conv1D, whose dense weight is stored as (in, out).
        scheme: how the weight is packed.
        bias: whether there is a bias, which stays dense.
        transposed: whether the dense module is a Conv1D.
        rule: label of the rule by which inputs are dropped (`cptq.layouts.activations`), or empty.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        scheme: Candidate,
        *,
        bias: bool,
        transposed: bool = False,
        rule: str = "",
    ) -> None:
        super().__init__(shape, scheme)
        self.rule: RuleKind | None = None
        self.set_rule(rule)
        self.out_features, self.in_features = shape
        self.transposed = transposed
        empty = nn.Parameter(torch.zeros(shape[0]), requires_grad=False) if bias else None
        self.bias: nn.Parameter | None
        self.register_parameter("bias", empty)

    def set_rule(self, label: str) -> None:
        """Have another rule, with tensors of zeros; an empty label for none."""
        self.rule = parse_rule(label) if label else None
        for part in PARTS:
            self._parameters.pop(part, None)
        for spec in list_rule_tensors("", self.shape, label):
            value = nn.Parameter(torch.zeros(spec.shape), requires_grad=False)
            self.register_parameter(spec.name[1:], value)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out)."""
        if torch.compiler.is_compiling():
            found: Tensor = compiled.linear(x, self.number, self.out_features)
            return found
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out), outside of `torch.compile`."""
        bias = self._parameters["bias"]
        if self.rule is None or not activations.is_enabled():
            return operations.linear(x, self.packed, bias)
        return activations.multiply(
            self.rule, self.rule_tensors, x, lambda kept: operations.linear(kept, self.packed, bias)
        )

    @property
    def rule_tensors(self) -> dict[str, Tensor]:
        """The tensors of the rule by name."""
        found = {part: self._parameters.get(part) for part in PARTS}
        return {part: value for part, value in found.items() if value is not None}

    def make_dense(self, dtype: torch.dtype) -> nn.Module:
        """Return the dense module that this one replaces."""
        W_OI = self.dequantize(dtype)
        module: nn.Module
        if self.transposed:
            module = Conv1D(*self.shape)  # type: ignore[no-untyped-call]
            module.weight = nn.Parameter(W_OI.T.contiguous(), requires_grad=False)
        else:
            module = nn.Linear(1, 1, bias=False)
            module.out_features, module.in_features = self.shape
            module.weight = nn.Parameter(W_OI, requires_grad=False)
        module.register_parameter("bias", self.bias)
        return module


class PackedEmbedding(PackedModule):
    """An embedding: rows of W (vocabulary, width), unpacked on access."""

    def __init__(
        self, shape: tuple[int, int], scheme: Candidate, *, padding_idx: int | None = None
    ) -> None:
        super().__init__(shape, scheme)
        self.num_embeddings, self.embedding_dim = shape
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (...) to (..., width) in the type of the scales, which is the model's."""
        if torch.compiler.is_compiling():
            found: Tensor = compiled.embedding(ids, self.number, self.embedding_dim, self.dtype)
            return found
        return self.compute(ids)

    def compute(self, x: Tensor) -> Tensor:
        """Map ids (...) to (..., width), outside of `torch.compile`."""
        return operations.embedding(x, self.packed, self.dtype)

    def make_dense(self, dtype: torch.dtype) -> nn.Module:
        """Return the dense module that this one replaces."""
        weight = nn.Parameter(self.dequantize(dtype), requires_grad=False)
        module = nn.Embedding(1, 1, padding_idx=None)
        module.num_embeddings, module.embedding_dim = self.shape
        module.padding_idx, module.weight = self.padding_idx, weight
        return module


def make_packed_module(module: nn.Module, scheme: Candidate, rule: str = "") -> PackedModule | None:
    """Make an empty packed module in place of a dense one; None for other kinds of modules.

    `rule`: of a linear, how it drops inputs. Subclasses of embeddings are not replaced: they may
    scale or shift what they look up.
    """
    if type(module) is Conv1D:
        inputs, out = module.weight.shape
        return PackedLinear((out, inputs), scheme, bias=True, transposed=True, rule=rule)
    if isinstance(module, nn.Linear):  # the writer has seen that a subclass only multiplies
        shape = (module.out_features, module.in_features)
        return PackedLinear(shape, scheme, bias=module.bias is not None, rule=rule)
    if type(module) is nn.Embedding and module.max_norm is None and not (scheme.sparsity or rule):
        shape = (module.num_embeddings, module.embedding_dim)
        return PackedEmbedding(shape, scheme, padding_idx=module.padding_idx)
    return None


def remove_rules(model: nn.Module) -> None:
    """Have the packed linears of a model multiply all inputs, for good."""
    for module in find_packed_modules(model).values():
        if isinstance(module, PackedLinear):
            module.set_rule("")
    quantization: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if getattr(quantization, "activations", None) is not None:
        quantization.activations = None


def find_packed_modules(model: nn.Module) -> dict[str, PackedModule]:
    """Return the packed modules of a model by name; a tied head is listed besides its embedding."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedModule)}
