"""Compute the change dW = W - Q(W) that a candidate makes to a layer, by nearest rounding.

A sparse candidate drops weights first, the smallest of the matrix or two of every four neighbouring
inputs, and its grid is fitted to the rest. Weights are dropped by magnitude, so that scores need no
activations; the compressors use activations (`cptq.compression.problem`) and lose less.

Fitting the scales takes nearly all the time of rounding, and they are few: `NearestRounding` keeps
those of every layer and candidate, so that computing the change again costs only the encoding.

Memory: one number of the storage type per group, layer and candidate.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import pad

from cptq.checkpoint.weights import get_storage_dtype
from cptq.errors import UsageError
from cptq.layouts.groups import resolve_group
from cptq.layouts.packed import TWO_OF_FOUR, UNSTRUCTURED
from cptq.numerics.asymmetric import dequantize_asymmetric, quantize_asymmetric
from cptq.numerics.grid import dequantize, encode, fit_scales
from cptq.numerics.masks import build_magnitude_mask, build_two_of_four_mask
from cptq.types import Candidate, LayerSpec, Unit


def check_candidates(candidates: tuple[Candidate, ...]) -> None:
    """Raise UsageError for a candidate whose rounding error cannot be computed here."""
    for candidate in candidates:
        if candidate.pattern not in ("none", UNSTRUCTURED, TWO_OF_FOUR):
            raise UsageError(
                f"no metric can score the pattern {candidate.pattern!r}",
                allowed=f"grids, dense, with unstructured sparsity or with {TWO_OF_FOUR}",
            )


def changes_weights(candidate: Candidate) -> bool:
    """Return whether storing a unit as this candidate changes its weights."""
    return not candidate.dense or candidate.sparsity > 0


def compute_rounding_error(W_OI: Tensor, spec: LayerSpec, candidate: Candidate) -> Tensor:
    """Return W - Q(W), (out, in), in the type of `W_OI`.

    A weight that a sparse candidate drops is exactly 0 in Q(W).
    """
    return NearestRounding().compute_error(W_OI, spec, candidate)


class NearestRounding:
    """Compute rounding errors on demand and keep the fitted scales."""

    def __init__(self) -> None:
        self._scales: dict[tuple[str, Candidate], Tensor] = {}

    def compute_errors(
        self, unit: Unit, weights: Sequence[Tensor], candidate: Candidate
    ) -> tuple[Tensor, ...]:
        """Return the error of each of a unit's layers, whose weights W_OI are given in order."""
        layers = zip(weights, unit.layers, strict=True)
        return tuple(self.compute_error(W_OI, spec, candidate) for W_OI, spec in layers)

    def compute_error(self, W_OI: Tensor, spec: LayerSpec, candidate: Candidate) -> Tensor:
        """Return W - Q(W) of one layer, (out, in), in the type of `W_OI`."""
        kept_OI = W_OI * _build_mask(W_OI, candidate) if candidate.sparsity else W_OI
        if candidate.dense:
            return W_OI - kept_OI
        if not candidate.symmetric:
            return W_OI - self._round_asymmetric(kept_OI, spec, candidate)
        scale_OG = self._get_scale(kept_OI, spec, candidate)
        kept_OGK = kept_OI.reshape(*scale_OG.shape, -1)
        codes_OGK = encode(kept_OGK, scale_OG.to(W_OI.dtype), candidate.bits)
        return W_OI - dequantize(codes_OGK.view(W_OI.shape), scale_OG, W_OI.dtype)

    def _round_asymmetric(self, kept_OI: Tensor, spec: LayerSpec, candidate: Candidate) -> Tensor:
        """Return Q(W) on a grid with zero points, which is fitted again each time."""
        group = resolve_group(spec.shape[1], candidate.group_size)
        grid = quantize_asymmetric(
            kept_OI, candidate.bits, group, scale_dtype=get_storage_dtype(spec)
        )
        return dequantize_asymmetric(*grid, kept_OI.dtype)

    def _get_scale(self, kept_OI: Tensor, spec: LayerSpec, candidate: Candidate) -> Tensor:
        key = spec.name, candidate
        if key not in self._scales:
            group = resolve_group(spec.shape[1], candidate.group_size)
            self._scales[key] = fit_scales(
                kept_OI, candidate.bits, group, scale_dtype=get_storage_dtype(spec)
            )
        return self._scales[key]


def _build_mask(W_OI: Tensor, candidate: Candidate) -> Tensor:
    """Return which weights stay; of a tail of fewer than four inputs also the two largest.

    No format stores such a tail, so no plan contains one, but its unit still has a score.
    """
    if candidate.pattern != TWO_OF_FOUR:
        return build_magnitude_mask(W_OI, candidate.sparsity)
    inputs = W_OI.shape[1]
    return build_two_of_four_mask(pad(W_OI, (0, -inputs % 4)))[:, :inputs]
