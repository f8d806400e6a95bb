"""Take the inventory of a model: every weight matrix in forward order, with role, group and ties.

The order, and whether a layer runs at all, are observed, not assumed: a short input goes through
the model once, and for each linear, Conv1D and embedding the first call and its input are recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cptq.checkpoint.architectures import Architecture
from cptq.errors import ModelError
from cptq.types import Emit, LayerKind, LayerSpec, Notice, TensorSpec, Unit

#: tokens of the traced input
TRACE_TOKENS = 8

CONV1D_REASON = "a Conv1D, which the compressed-tensors format cannot hold; kept dense"

REPEATED_REASON = "its block runs more than once in a forward pass; kept dense"


@dataclass(kw_only=True)
class Trace:
    """The record of one forward pass: modules in call order and the input of each.

    `repeated`: blocks that ran more than once, whose inputs and outputs do not form a chain.
    """

    order: list[str] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """Layers and units in forward order, and the names of the blocks.

    `vocabulary`: the token embedding, and the output head where it is a matrix of its own.
    """

    block_names: tuple[str, ...]
    layers: tuple[LayerSpec, ...]
    units: tuple[Unit, ...]
    vocabulary: tuple[Unit, ...] = ()


def take_inventory(
    module: nn.Module,
    family: Architecture,
    tensors: Mapping[str, TensorSpec],
    emit: Emit,
    *,
    conv1d: bool = False,
    trace: Trace | None = None,
) -> Inventory:
    """List the layers of a model that has not been compressed.

    Args:
        module: the model, in evaluation mode.
        family: its architecture.
        tensors: storage types by tensor name (see `list_stored_tensors`).
        emit: receives a Notice for every linear that will be left dense.
        conv1d: count a Conv1D as compressible, for formats that can store it.
        trace: of a forward pass, where the model cannot run here.

    Raises:
        ModelError: no blocks are found, or the model does not run on token ids.
    """
    blocks = find_blocks(module, family)
    trace = trace or trace_forward(module, blocks)
    ties = find_ties(module)
    layers = tuple(
        _describe_layer(module, name, family, blocks, trace, ties, tensors, conv1d)
        for name in _list_in_forward_order(module, trace)
    )
    _report_dense(layers, emit)
    _report_unlisted(module, layers, emit)
    return Inventory(
        block_names=blocks,
        layers=layers,
        units=group_units(layers),
        vocabulary=list_vocabulary(module, layers),
    )


def find_blocks(module: nn.Module, family: Architecture) -> tuple[str, ...]:
    """Return the dotted names of the model's blocks, in order."""
    lists = {n: m for n, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    known = [n for n in lists if family.blocks and f".{n}".endswith(f".{family.blocks}")]
    even = [n for n, m in lists.items() if len({type(block) for block in m}) == 1]
    name = known[0] if known else max(even, key=lambda n: len(lists[n]), default=None)
    if name is None:
        raise ModelError(
            "no stack of equal blocks was found in the model",
            allowed="transformer models whose blocks are in a ModuleList",
        )
    return tuple(f"{name}.{i}" for i in range(len(lists[name])))


def _has_weight(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding | Conv1D)


def list_matrices(module: nn.Module) -> list[str]:
    """Return the names of all linears, Conv1Ds and embeddings, in the order of the modules."""
    return [name for name, part in module.named_modules() if _has_weight(part)]


def trace_forward(module: nn.Module, blocks: tuple[str, ...]) -> Trace:
    """Run a few tokens and record which modules are called, in which order, with which input."""
    trace, handles = Trace(), []
    for name, part in module.named_modules():
        if _has_weight(part):
            handles.append(part.register_forward_hook(_record_call(trace, name)))
    seen: set[str] = set()
    for name in blocks:
        block = module.get_submodule(name)
        handles.append(block.register_forward_hook(_record_block(trace, seen, name)))
    try:
        device = next(module.parameters()).device
        vocabulary = int(module.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        ids = (torch.arange(TRACE_TOKENS, device=device) + 3).remainder(vocabulary)[None]
        # families look into a mask, which has no values on the meta device
        mask = {} if ids.is_meta else {"attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            module(input_ids=ids, **mask)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        raise ModelError(
            f"the model does not run on plain token ids ({type(error).__name__}: {error})",
            allowed="text models: causal LMs, masked LMs, sequence classifiers, encoders",
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _record_call(trace: Trace, name: str):  # type: ignore[no-untyped-def]
    def hook(_module: nn.Module, args: tuple[Tensor, ...], _output: object) -> None:
        if name not in trace.inputs and args:
            trace.order.append(name)
            trace.inputs[name] = args[0]  # kept, so that identity means identity

    return hook


def _record_block(trace: Trace, seen: set[str], name: str):  # type: ignore[no-untyped-def]
    def hook(*_: object) -> None:
        (trace.repeated if name in seen else seen).add(name)

    return hook


def _list_in_forward_order(module: nn.Module, trace: Trace) -> list[str]:
    silent = [n for n, m in module.named_modules() if _has_weight(m) and n not in trace.inputs]
    return trace.order + silent


def find_ties(module: nn.Module) -> dict[str, str]:
    """Return {tensor name: name of the earlier tensor that is the same parameter}."""
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            ties[name] = owner
    return ties


def _describe_layer(
    module: nn.Module,
    name: str,
    family: Architecture,
    blocks: tuple[str, ...],
    trace: Trace,
    ties: Mapping[str, str],
    tensors: Mapping[str, TensorSpec],
    conv1d: bool,
) -> LayerSpec:
    part = module.get_submodule(name)
    block = next((i for i, b in enumerate(blocks) if name.startswith(f"{b}.")), None)
    tied = ties.get(f"{name}.weight")
    kind = _classify_layer(module, part)
    role = _find_role(name, kind, block, family)
    reason = CONV1D_REASON if kind == "conv1d" and not conv1d else None
    reason = reason or _find_dense_reason(kind, block, name in trace.inputs, tied)
    if reason is None and block is not None and blocks[block] in trace.repeated:
        reason = REPEATED_REASON
    weight = part.weight
    assert isinstance(weight, Tensor)
    shape = weight.T.shape if isinstance(part, Conv1D) else weight.shape
    return LayerSpec(
        name=name,
        block=block,
        role=role,
        kind=kind,
        shape=(shape[0], shape[1]),
        dtype=tensors[tied or f"{name}.weight"].dtype,
        fused=None if reason else _find_fused_name(name, role, family, trace),
        tied_to=tied.removesuffix(".weight") if tied else None,
        transposed=isinstance(part, Conv1D),
        compressible=reason is None,
        reason=reason,
        plain=type(part) in (nn.Linear, nn.Embedding, Conv1D),
    )


def _classify_layer(module: nn.Module, part: nn.Module) -> LayerKind:
    head = getattr(module, "get_output_embeddings", lambda: None)()
    if part is head:
        return "head"
    if isinstance(part, nn.Embedding):
        return "embedding"
    return "conv1d" if isinstance(part, Conv1D) else "linear"


def _find_role(name: str, kind: LayerKind, block: int | None, family: Architecture) -> str:
    if kind in ("embedding", "head"):
        return "lm_head" if kind == "head" else name.rsplit(".", 1)[-1]
    return name.rsplit(".", 1)[-1] if block is None else family.get_role(name)


def _find_dense_reason(
    kind: LayerKind, block: int | None, runs: bool, tied: str | None
) -> str | None:
    if kind == "embedding":
        return "an embedding outside the blocks"
    if kind == "head":
        return "the output head"
    if not runs:
        return "never runs in a forward pass, so it cannot be calibrated; kept dense"
    if tied:
        return f"shares its weight with {tied}; kept dense"
    return "outside the blocks; kept dense" if block is None else None


def _find_fused_name(name: str, role: str, family: Architecture, trace: Trace) -> str | None:
    """Return the unit's name if several linears are one decision."""
    parent = name.rsplit(".", 1)[0]
    if family.family != "generic":
        group = family.get_group(role)
        return f"{_strip_role(name, family)}.{group}" if group else None
    mates = [
        other
        for other in trace.order
        if other.rsplit(".", 1)[0] == parent and trace.inputs[other] is trace.inputs[name]
    ]
    ends = [mate.rsplit(".", 1)[-1] for mate in mates]
    return f"{parent}.{'+'.join(ends)}" if len(mates) > 1 else None


def _strip_role(name: str, family: Architecture) -> str:
    ends = [end for end in family.roles if name.endswith(f".{end}")]
    parent = max(ends, key=len)
    # bert's roles span two levels (attention.self.query): keep the parent module
    return name.rsplit(".", 1)[0] if "." in parent else name[: -len(parent) - 1]


def group_units(layers: tuple[LayerSpec, ...]) -> tuple[Unit, ...]:
    """Group the compressible layers into decisions, in forward order."""
    members: dict[str, list[LayerSpec]] = {}
    for layer in layers:
        if layer.compressible:
            members.setdefault(layer.fused or layer.name, []).append(layer)
    return tuple(
        Unit(
            name=name,
            block=group[0].block,
            role=group[0].role if len(group) == 1 else name.rsplit(".", 1)[-1],
            layers=tuple(group),
        )
        for name, group in members.items()
    )


def list_vocabulary(module: nn.Module, layers: tuple[LayerSpec, ...]) -> tuple[Unit, ...]:
    """Return units of the token embedding, and of an output head that is a matrix of its own.

    Their roles are `embedding`, `head`, or `embedding+head` of a matrix that is both. Positions and
    token types are small, and families look them up in their own ways: they are in no unit.
    """
    embedding = module.get_input_embeddings()  # type: ignore[operator]
    known = {spec.name: spec for spec in layers}
    roles: dict[str, list[str]] = {}
    for spec in layers:
        inner = module.get_submodule(spec.name) is embedding
        if inner or spec.kind == "head":
            roles.setdefault(spec.tied_to or spec.name, []).append("embedding" if inner else "head")
    return tuple(
        Unit(name=name, block=None, role="+".join(sorted(found)), layers=(known[name],))
        for name, found in roles.items()
        if name in known
    )


def _report_dense(layers: tuple[LayerSpec, ...], emit: Emit) -> None:
    # what becomes of the vocabulary is decided, and said, where the runtime is known
    layers = tuple(layer for layer in layers if layer.kind not in ("embedding", "head"))
    reasons = Counter(layer.reason for layer in layers if layer.reason)
    for reason, count in reasons.items():
        names = [layer.name for layer in layers if layer.reason == reason]
        some = ", ".join(names[:3]) + (f" and {count - 3} more" if count > 3 else "")
        emit(Notice(kind="skipped", subject=some, message=str(reason)))


def _report_unlisted(module: nn.Module, layers: tuple[LayerSpec, ...], emit: Emit) -> None:
    """Report matrices outside linears, Conv1Ds and embeddings, such as stacked experts."""
    listed = {layer.weight_name for layer in layers}
    names = [n for n, p in module.named_parameters() if p.ndim > 1 and n not in listed]
    if names:
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        emit(Notice(kind="skipped", subject=some, message="in no linear layer; kept dense"))
