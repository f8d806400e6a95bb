"""The change dW = W - Q(W) that a candidate makes to a layer, by rounding to nearest."""

from __future__ import annotations

from torch import Tensor

from cptq.checkpoint.weights import storage_dtype
from cptq.errors import UsageError
from cptq.numerics.asymmetric import dequantize_asymmetric, quantize_asymmetric
from cptq.numerics.grid import dequantize, quantize_nearest
from cptq.numerics.groups import resolve_group
from cptq.numerics.masks import magnitude_mask
from cptq.types import Candidate, LayerSpec


def check_candidates(candidates: tuple[Candidate, ...]) -> None:
    """Raises UsageError for a candidate whose rounding error cannot be computed here."""
    for candidate in candidates:
        if candidate.pattern not in ("none", "unstructured"):
            raise UsageError(
                f"no metric can score {candidate.label}",
                allowed="grids, dense or with unstructured sparsity",
            )


def rounding_error(W_OI: Tensor, spec: LayerSpec, candidate: Candidate) -> Tensor:
    """W - Q(W), (out, in), in the type of `W_OI`.

    A sparse candidate drops the smallest weights first; the grid holds an exact 0 for them.
    """
    kept_OI = W_OI * magnitude_mask(W_OI, candidate.sparsity) if candidate.sparsity else W_OI
    if candidate.dense:
        return W_OI - kept_OI
    group, dtype = resolve_group(spec.shape[1], candidate.group_size), storage_dtype(spec)
    if not candidate.symmetric:
        grid = quantize_asymmetric(kept_OI, candidate.bits, group, scale_dtype=dtype)
        return W_OI - dequantize_asymmetric(*grid, W_OI.dtype)
    codes_OI, scale_OG = quantize_nearest(kept_OI, candidate.bits, group, scale_dtype=dtype)
    return W_OI - dequantize(codes_OI, scale_OG, W_OI.dtype)
