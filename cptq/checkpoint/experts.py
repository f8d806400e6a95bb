"""Split a mixture of experts into linear layers: each expert's matrices as in the checkpoint.

transformers 5 stacks the experts of a block into two parameters when it loads them,

    gate_up_proj (E, 2 I, H),  down_proj (E, H, I),

which have no hooks and cannot be compressed. Here they become E modules of three linears,

    y = sum over the experts e chosen for x of  p_e down_e(act(gate_e(x)) * up_e(x)),

that share the stack's memory and have names which stock transformers stacks when it loads them
(`mlp.experts.7.up_proj`; Mixtral's are `w1`, `w3` and `w2`). Every expert is called in every pass,
possibly with no rows, so that the hooks on the layers reach all of them.

Only stacks of that form are split, and only if the checkpoint has them one by one, or transformers'
table of conversions says how it stacks them, and if the result agrees with the original on random
rows. Any other stays stacked, and dense (GPT-OSS, Granite).

Limits: rows of padding reach experts, too, and are counted; calibration text of language models has
none. Cost: a loop over all experts in Python, where the stock model groups them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

#: names of an expert's linears in most families
PLAIN = ("gate_proj", "up_proj", "down_proj")
#: rows on which the two forms are compared, and the tolerance relative to the largest value
_ROWS, _CLOSE = 16, 1e-2


class Expert(nn.Module):
    """One gated feed-forward layer on views of a stack: W_gate, W_up (I, H), W_down (H, I).

    `names`: of the three linears.
    """

    def __init__(
        self,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        act: Callable[..., Tensor],
        names: Sequence[str] = PLAIN,
    ) -> None:
        super().__init__()
        for name, weight in zip(names, (gate, up, down), strict=True):
            self.add_module(name, _make_linear(weight))
        self._act, self._names = act, tuple(names)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(name) for name in self._names)
        return cast(Tensor, down(self._act(gate(x)) * up(x)))


class UnstackedExperts(nn.Module):
    """Replaces a stack; the experts are its children `0`, `1`, ..."""

    def __init__(self, stack: nn.Module, names: Sequence[str] = PLAIN) -> None:
        super().__init__()
        gate_up, down = cast(Tensor, stack.gate_up_proj), cast(Tensor, stack.down_proj)
        act = cast(Callable[..., Tensor], stack.act_fn)
        for index, (both, last) in enumerate(zip(gate_up, down, strict=True)):
            gate, up = both.chunk(2)
            self.add_module(str(index), Expert(gate, up, last, act, names))

    def forward(self, x_TH: Tensor, chosen_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Return the weighted sum, per row, of the experts chosen for it."""
        result_TH = torch.zeros_like(x_TH)
        for index, expert in enumerate(self.children()):
            token, place = torch.where(chosen_TK == index)
            y = expert(x_TH[token]) * weight_TK[token, place, None]
            result_TH.index_add_(0, token, y.to(result_TH.dtype))
        return result_TH


def unstack_experts(module: nn.Module, stored: Collection[str]) -> None:
    """Split, in place, every stack of experts that stock transformers also loads one by one."""
    converters = _list_converters(module)
    for name, part in list(module.named_modules()):
        names = _find_names(name, stored, converters) if _is_stack(part) else None
        if names is not None:
            apart = UnstackedExperts(part, names)
            if _agrees(part, apart):
                parent, _, own = name.rpartition(".")
                setattr(module.get_submodule(parent), own, apart.eval())


def _list_converters(module: nn.Module) -> list[WeightConverter]:
    """Return how stock transformers makes the tensors of a family from those of checkpoints."""
    if not isinstance(module, PreTrainedModel):
        return []
    found = get_model_conversion_mapping(module, add_legacy=False)
    return [each for each in found if isinstance(each, WeightConverter)]


def _find_names(
    stack: str, stored: Collection[str], converters: Sequence[WeightConverter]
) -> tuple[str, ...] | None:
    """Return what the linears of each expert are called; None where all are stored as one.

    Either the checkpoint has them under the plain names, or stock transformers stacks others.
    """
    if all(f"{stack}.0.{name}.weight" in stored for name in PLAIN):
        return PLAIN
    both = _find_sources(f"{stack}.gate_up_proj", 2, converters)
    down = _find_sources(f"{stack}.down_proj", 1, converters)
    return (*both, *down) if both and down else None


def _find_sources(
    tensor: str, count: int, converters: Sequence[WeightConverter]
) -> tuple[str, ...]:
    """Return the ends of the `count` names of which a tensor is stacked, expert by expert."""
    stack = tensor.rpartition(".")[0]
    for converter in converters:
        sources = converter._original_source_patterns
        parts = [re.fullmatch(r"(.*)\.\*\.(\w+)\.weight", source) for source in sources]
        fits = re.search(f"{converter._original_target_patterns[0]}$", tensor)
        if fits and len(parts) == count and all(p and stack.endswith(p[1]) for p in parts):
            return tuple(part[2] for part in parts if part)
    return ()


def _make_linear(W_OI: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(W_OI.shape[1], W_OI.shape[0], bias=False)
    linear.weight = nn.Parameter(W_OI.detach(), requires_grad=False)
    return linear


def _is_stack(part: nn.Module) -> bool:
    own = {name: tuple(p.shape) for name, p in part.named_parameters(recurse=False)}
    if set(own) != {"gate_up_proj", "down_proj"} or not hasattr(part, "act_fn"):
        return False
    if not all(len(shape) == 3 for shape in own.values()):
        return False
    experts, hidden, inner = own["down_proj"]
    return own["gate_up_proj"] == (experts, 2 * inner, hidden)


@torch.no_grad()
def _agrees(stack: nn.Module, apart: nn.Module) -> bool:
    """Return whether both compute the same; a family may clamp or weight in its own way.

    Where there are no values (on the meta device) they are taken to.
    """
    down = cast(Tensor, stack.down_proj)
    if down.is_meta:
        return True
    draw = torch.Generator().manual_seed(0)
    x_TH = torch.randn(_ROWS, down.shape[1], generator=draw).to(down)
    chosen_TK = torch.rand(_ROWS, len(down), generator=draw).argsort(1)[:, :2].to(down.device)
    weight_TK = torch.rand(chosen_TK.shape, generator=draw).to(down)
    try:
        theirs, ours = (part(x_TH, chosen_TK, weight_TK) for part in (stack, apart))
    except (TypeError, RuntimeError, ValueError, IndexError):  # it has another signature
        return False
    furthest = (theirs - ours).abs().max()
    return theirs.shape == ours.shape and bool(furthest <= _CLOSE * theirs.abs().max())
