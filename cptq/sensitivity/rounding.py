"""The change dW = W - Q(W) that a candidate makes to a layer, by rounding to nearest.

A sparse candidate drops weights first, the smallest of the matrix or two of every four neighbouring
inputs, and its grid is fitted to what stays. By magnitude, so that a score needs no activations:
the compressors look at those (`cptq.compression.problem`) and lose less.

Fitting the scales takes nearly all the time of rounding, and they are few: `Rounding` keeps those
of every layer and candidate, so that the change can be had again at the price of encoding.

Memory: one number of the storage type per group, layer and candidate.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import pad

from cptq.checkpoint.weights import storage_dtype
from cptq.errors import UsageError
from cptq.layouts.groups import resolve_group
from cptq.layouts.packed import TWO_OF_FOUR, UNSTRUCTURED
from cptq.numerics.asymmetric import dequantize_asymmetric, quantize_asymmetric
from cptq.numerics.grid import dequantize, encode, fit_scales
from cptq.numerics.masks import magnitude_mask, two_of_four_mask
from cptq.types import Candidate, LayerSpec, Unit


def check_candidates(candidates: tuple[Candidate, ...]) -> None:
    """Raises UsageError for a candidate whose rounding error cannot be computed here."""
    for candidate in candidates:
        if candidate.pattern not in ("none", UNSTRUCTURED, TWO_OF_FOUR):
            raise UsageError(
                f"no metric can score the pattern {candidate.pattern!r}",
                allowed=f"grids, dense, with unstructured sparsity or with {TWO_OF_FOUR}",
            )


def changes(candidate: Candidate) -> bool:
    """Whether storing a unit so changes its weights at all."""
    return not candidate.dense or candidate.sparsity > 0


def rounding_error(W_OI: Tensor, spec: LayerSpec, candidate: Candidate) -> Tensor:
    """W - Q(W), (out, in), in the type of `W_OI`.

    A weight that a sparse candidate drops is exactly 0 in Q(W).
    """
    return Rounding().error(W_OI, spec, candidate)


class Rounding:
    """Compute rounding errors on demand and keep the fitted scales."""

    def __init__(self) -> None:
        self._scales: dict[tuple[str, Candidate], Tensor] = {}

    def errors(
        self, unit: Unit, weights: Sequence[Tensor], candidate: Candidate
    ) -> tuple[Tensor, ...]:
        """The error of each of a unit's layers, whose weights W_OI are given in order."""
        layers = zip(weights, unit.layers, strict=True)
        return tuple(self.error(W_OI, spec, candidate) for W_OI, spec in layers)

    def error(self, W_OI: Tensor, spec: LayerSpec, candidate: Candidate) -> Tensor:
        """W - Q(W) of one layer, (out, in), in the type of `W_OI`."""
        kept_OI = W_OI * _mask(W_OI, candidate) if candidate.sparsity else W_OI
        if candidate.dense:
            return W_OI - kept_OI
        if not candidate.symmetric:
            return W_OI - self._asymmetric(kept_OI, spec, candidate)
        scale_OG = self._scale(kept_OI, spec, candidate)
        kept_OGK = kept_OI.reshape(*scale_OG.shape, -1)
        codes_OGK = encode(kept_OGK, scale_OG.to(W_OI.dtype), candidate.bits)
        return W_OI - dequantize(codes_OGK.view(W_OI.shape), scale_OG, W_OI.dtype)

    def _asymmetric(self, kept_OI: Tensor, spec: LayerSpec, candidate: Candidate) -> Tensor:
        """Q(W) on a grid with zero points, which are not kept: it is rounded anew each time."""
        group = resolve_group(spec.shape[1], candidate.group_size)
        grid = quantize_asymmetric(kept_OI, candidate.bits, group, scale_dtype=storage_dtype(spec))
        return dequantize_asymmetric(*grid, kept_OI.dtype)

    def _scale(self, kept_OI: Tensor, spec: LayerSpec, candidate: Candidate) -> Tensor:
        key = spec.name, candidate
        if key not in self._scales:
            group = resolve_group(spec.shape[1], candidate.group_size)
            self._scales[key] = fit_scales(
                kept_OI, candidate.bits, group, scale_dtype=storage_dtype(spec)
            )
        return self._scales[key]


def _mask(W_OI: Tensor, candidate: Candidate) -> Tensor:
    """Which weights stay; of a tail of fewer than four inputs the two largest, too.

    No format stores such a tail, so that no plan holds one; its unit has a score all the same.
    """
    if candidate.pattern != TWO_OF_FOUR:
        return magnitude_mask(W_OI, candidate.sparsity)
    inputs = W_OI.shape[1]
    return two_of_four_mask(pad(W_OI, (0, -inputs % 4)))[:, :inputs]
