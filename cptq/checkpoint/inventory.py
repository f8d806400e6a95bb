"""Take the inventory of a model: every weight matrix in forward order, with role, group and ties.

The order, and whether a layer runs at all, are observed, not assumed: a short input goes through
the model once, and for each linear, Conv1D and embedding the first call and its input are recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from cptq.checkpoint.architectures import GENERIC, Architecture
from cptq.checkpoint.chain import find_break
from cptq.checkpoint.initialization import list_initialized_linears
from cptq.errors import ModelError
from cptq.types import Emit, LayerKind, LayerSpec, Notice, TensorSpec, Unit

#: tokens of the traced input
TRACE_TOKENS = 8

CONV1D_REASON = "a Conv1D, which the compressed-tensors format cannot hold; kept dense"

OWN_FORWARD_REASON = (
    "a linear with a forward of its own ({}), which does more than multiply: a router, or "
    "activations that are rounded; kept dense"
)
READ_REASON = (
    "the model's code reads its weight beside calling it, and a packed layer has none; kept dense"
)
VOCABULARY_REASON = (
    "the model's code reads this matrix beside looking tokens up and multiplying; kept dense"
)
#: least share of the matrices' weights that blocks hold
LEAST_SHARE = 0.5


@dataclass(kw_only=True)
class Trace:
    """The record of one forward pass: modules in call order and the input of each.

    `special`: linears whose output is not x W^T + b; `read`: those whose weight something else
    than their own forward has read.
    """

    order: list[str] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    special: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)


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
    trace = trace or trace_forward(module)
    blocks = choose_blocks(module, family, emit)
    ties = find_ties(module)
    layers = tuple(
        _describe_layer(module, name, family, blocks, trace, ties, tensors, conv1d)
        for name in _list_in_forward_order(module, trace)
    )
    if family is GENERIC:  # the others are known to load
        read = list_initialized_linears(module)
        layers = tuple(replace(spec, initialized=spec.name in read) for spec in layers)
    _report_dense(layers, emit)
    _report_unlisted(module, layers, emit)
    return Inventory(
        block_names=blocks,
        layers=layers,
        units=group_units(layers),
        vocabulary=list_vocabulary(module, layers, trace.read, emit),
    )


def choose_blocks(module: nn.Module, family: Architecture, emit: Emit) -> tuple[str, ...]:
    """Return the names of blocks that are a chain and hold most of the weights.

    Where the stack of blocks is none, the part of the model around it is taken as a single block,
    which a Notice says.

    Raises:
        ModelError: no part of the model can be run like that.
    """
    blocks = find_blocks(module, family)
    reason = _find_objection(module, blocks) if blocks else "there is no stack of blocks"
    if reason is None:
        return blocks
    for place in _list_places_around(module, blocks):
        if _find_objection(module, (place,)) is None:
            message = (
                f"its blocks are not a chain ({reason}): {place or 'all of it'} is run as a whole, "
                "which takes more time and memory"
            )
            emit(Notice(kind="fallback", subject=type(module).__name__, message=message))
            return (place,)
    raise ModelError(
        f"{type(module).__name__} cannot be run block by block ({reason}), nor around its blocks",
        allowed="transformer models whose hidden states go from one block to the next",
    )


def find_blocks(module: nn.Module, family: Architecture) -> tuple[str, ...]:
    """Return the dotted names of the model's blocks, in order; none without a stack of modules.

    Of a family that is not known, the list of modules that holds most weights.
    """
    lists = {n: m for n, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    known = [n for n in lists if family.blocks and f".{n}".endswith(f".{family.blocks}")]
    weights = {name: _count_weights(blocks) for name, blocks in lists.items()}
    name = known[0] if known else max(weights, key=lambda n: weights[n], default=None)
    return () if name is None else tuple(f"{name}.{i}" for i in range(len(lists[name])))


def _find_objection(module: nn.Module, blocks: tuple[str, ...]) -> str | None:
    """Return why these parts cannot be taken for the blocks of a model, or None."""
    ends = (getattr(module, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output"))
    outside = sum(_count_weights(end) for end in ends if isinstance(end, nn.Linear))
    held = sum(_count_weights(module.get_submodule(name)) for name in blocks)
    total = _count_weights(module) - outside
    if not total:
        return "it has no weights but its vocabulary"
    if held < LEAST_SHARE * total:
        return f"they hold {held / total:.0%} of its weights"
    if next(module.parameters()).is_meta:
        return None  # there are no values to compare
    return find_break(module, blocks)


def _count_weights(module: nn.Module) -> int:
    """Return the number of weights in matrices that multiply, stacks of experts included."""
    found = {
        id(p): p.numel()
        for part in module.modules()
        if not isinstance(part, nn.Embedding)
        for p in part.parameters(recurse=False)
        if p.ndim > 1
    }
    return sum(found.values())


def _list_places_around(module: nn.Module, blocks: tuple[str, ...]) -> list[str]:
    """Return the modules around the blocks, from within, then the base model, then the model."""
    places = []
    place = blocks[0].rpartition(".")[0].rpartition(".")[0] if blocks else ""
    while place:
        places.append(place)
        place = place.rpartition(".")[0]
    base = str(getattr(module, "base_model_prefix", ""))
    if base and base not in places and isinstance(getattr(module, base, None), nn.Module):
        places.append(base)
    return [*places, ""]


def is_inside(name: str, block: str) -> bool:
    """Whether a layer lies in a block; "" is the whole model."""
    return not block or name.startswith(f"{block}.")


def _has_weight(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding | Conv1D)


def list_matrices(module: nn.Module) -> list[str]:
    """Return the names of all linears, Conv1Ds and embeddings, in the order of the modules."""
    return [name for name, part in module.named_modules() if _has_weight(part)]


def trace_forward(module: nn.Module) -> Trace:
    """Run a few tokens and record which modules are called, in which order, with which input."""
    trace, handles = Trace(), []
    for name, part in module.named_modules():
        if _has_weight(part):
            handles.append(part.register_forward_hook(_record_call(trace, name)))
    try:
        device = next(module.parameters()).device
        vocabulary = int(module.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        ids = (torch.arange(TRACE_TOKENS, device=device) + 3).remainder(vocabulary)[None]
        # families look into a mask, which has no values on the meta device
        mask = {} if ids.is_meta else {"attention_mask": torch.ones_like(ids)}
        with torch.no_grad(), _watch_reads(module, trace):
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
    def hook(part: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
        if args and isinstance(part, nn.Linear) and not _is_product(part, args[0], output):
            trace.special.add(name)
        if name not in trace.inputs and args:
            trace.order.append(name)
            trace.inputs[name] = args[0]  # kept, so that identity means identity

    return hook


@contextmanager
def _watch_reads(module: nn.Module, trace: Trace) -> Iterator[None]:
    """Note the linears whose weight is read while they do not run.

    T5 asks for the type of a weight, Mamba multiplies by weights itself. A parameter is found by
    `Module.__getattr__`, which is replaced meanwhile.
    """
    kinds = (nn.Linear, Conv1D)
    names = {part: name for name, part in module.named_modules() if isinstance(part, kinds)}
    running: set[nn.Module] = set()
    find = nn.Module.__getattr__

    def note(part: nn.Module, attribute: str) -> Any:
        if attribute == "weight" and part in names and part not in running:
            trace.read.add(names[part])
        return find(part, attribute)

    with ExitStack() as stack:
        for part in names:
            begin = part.register_forward_pre_hook(lambda one, _args: running.add(one))
            end = part.register_forward_hook(lambda one, *_: running.discard(one), prepend=False)
            stack.callback(begin.remove)
            stack.callback(end.remove)
        stack.callback(setattr, nn.Module, "__getattr__", find)
        nn.Module.__getattr__ = note  # type: ignore[method-assign]
        yield


def _is_product(linear: nn.Linear, x: Tensor, output: object) -> bool:
    """Whether a linear gave x W^T + b; one whose forward is nn.Linear's always does."""
    if type(linear).forward is nn.Linear.forward:
        return True
    if not isinstance(output, Tensor):
        return False
    plain = functional.linear(x, linear.weight, linear.bias)
    return plain.shape == output.shape and torch.allclose(plain, output, rtol=1e-3, atol=1e-5)


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
    block = next((i for i, b in enumerate(blocks) if is_inside(name, b)), None)
    tied = ties.get(f"{name}.weight")
    kind = _classify_layer(module, part)
    role = _find_role(name, kind, block, family)
    reason = CONV1D_REASON if kind == "conv1d" and not conv1d else None
    reason = reason or _find_dense_reason(kind, block, name in trace.inputs, tied)
    if reason is None and name in trace.special:
        reason = OWN_FORWARD_REASON.format(type(part).__name__)
    if reason is None and name in trace.read:
        reason = READ_REASON
    weight = part.weight
    assert isinstance(weight, Tensor)
    # of a subclass the pass has shown it
    multiplies = isinstance(part, nn.Linear) and name in trace.inputs and name not in trace.special
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
        plain=type(part) in (nn.Linear, nn.Embedding, Conv1D) or multiplies,
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


def list_vocabulary(
    module: nn.Module, layers: tuple[LayerSpec, ...], read: Collection[str], emit: Emit
) -> tuple[Unit, ...]:
    """Return units of the token embedding, and of an output head that is a matrix of its own.

    Their roles are `embedding`, `head`, or `embedding+head` of a matrix that is both. Positions and
    token types are small, and families look them up in their own ways: they are in no unit. Nor is
    a matrix whose weight other code reads (`read`), or that further embeddings share (T5's).
    """
    embedding = module.get_input_embeddings()  # type: ignore[operator]
    known = {spec.name: spec for spec in layers}
    roles: dict[str, list[str]] = {}
    shared: set[str] = set()
    for spec in layers:
        inner = module.get_submodule(spec.name) is embedding
        if inner or spec.kind == "head":
            roles.setdefault(spec.tied_to or spec.name, []).append("embedding" if inner else "head")
        elif spec.kind == "embedding" and spec.tied_to:
            shared.add(spec.tied_to)
        if spec.name in read:
            shared.add(spec.tied_to or spec.name)
    for name in sorted(shared & set(roles)):
        emit(Notice(kind="skipped", subject=name, message=VOCABULARY_REASON))
    return tuple(
        Unit(name=name, block=None, role="+".join(sorted(found)), layers=(known[name],))
        for name, found in roles.items()
        if name in known and name not in shared
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
