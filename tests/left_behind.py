"""What a function that hooks into a model may leave behind, and must not."""

from __future__ import annotations

from torch import nn

from cptq.checkpoint.resident import HeldForward


def list_replaced_forwards(module: nn.Module) -> list[nn.Module]:
    """Return the parts whose forward is neither their class's nor the one that loads weights."""
    return [
        part
        for part in module.modules()
        if "forward" in vars(part) and not isinstance(vars(part)["forward"], HeldForward)
    ]


def list_left_behind(module: nn.Module) -> list[nn.Module]:
    """Return these, and the parts with a hook on their input."""
    return [part for part in module.modules() if part._forward_pre_hooks] + list_replaced_forwards(
        module
    )
