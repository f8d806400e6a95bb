"""How a file format stores a compressed layer, in words and numbers alone.

A budget is counted where no torch is loaded, so the part of a format that counting needs is a
value of its own: which choices it can hold, and which tensors a layer becomes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from cptq.types import Candidate, LayerSpec, TensorSpec


class Layout(Protocol):
    """What a format makes of one layer. Dense layers (`w16`) are the same in all and not asked."""

    @property
    def name(self) -> str:
        """The format's name, as in `cptq.artifact.formats.FORMATS`."""

    def explain_refusal(self, layer: LayerSpec, candidate: Candidate) -> str | None:
        """Why the format cannot hold a layer so compressed, as a clause; None where it can."""

    def tensors(self, layer: LayerSpec, candidate: Candidate) -> tuple[TensorSpec, ...]:
        """The tensors that replace the layer's weight in the file, in their exact types and
        shapes; only asked where `refusal` is None."""


def replace_tensors(
    tensors: Iterable[TensorSpec], packed: Mapping[str, Sequence[TensorSpec]]
) -> list[TensorSpec]:
    """The dense list with some weights (keys: tensor names) replaced in place."""
    replaced: list[TensorSpec] = []
    for spec in tensors:
        replaced.extend(packed.get(spec.name, (spec,)))
    return replaced
