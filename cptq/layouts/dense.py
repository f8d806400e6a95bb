"""Dense weights at 16 bits: what `cptq export --format dense` writes. Pure Python."""

from __future__ import annotations

from cptq.types import Candidate, LayerSpec, TensorSpec, choose_16bit_dtype


class Dense16Layout:
    """The `cptq.layouts.Layout` of 16-bit weights, whatever they were rounded to before."""

    name = "dense"

    def explain_refusal(self, layer: LayerSpec, candidate: Candidate) -> str | None:
        """Nothing is refused."""
        return None

    def tensors(self, layer: LayerSpec, candidate: Candidate) -> tuple[TensorSpec, ...]:
        """The weight, in 16 bits."""
        shape = layer.shape[::-1] if layer.transposed else layer.shape
        return (
            TensorSpec(name=layer.weight_name, dtype=choose_16bit_dtype(layer.dtype), shape=shape),
        )


DENSE_16BIT = Dense16Layout()
