"""Compute the change dW = W - Q(W) that a candidate makes to a layer, by nearest rounding.

A sparse candidate drops weights first, the smallest of the matrix or of every M neighbouring
inputs, and its grid is fitted to what stays. By magnitude, so that a score needs no activations:
the compressors look at those (`cptq.compression.layer`) and lose less.

Fitting the grids takes nearly all the time of rounding, and they are small: `NearestRounding` keeps
those of every layer and candidate until the unit is forgotten, so that repeating a change only
costs the encoding.

Memory: one number of the storage type per group, layer and candidate, and a byte for a zero point.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import pad

from cptq.checkpoint.weights import get_scale_type
from cptq.errors import UsageError
from cptq.layouts.groups import resolve_group
from cptq.layouts.packed import UNSTRUCTURED
from cptq.numerics.float8 import round_to_float8
from cptq.numerics.grid import Grid, dequantize, encode, fit_grid
from cptq.numerics.levels import Spacing
from cptq.numerics.masks import build_magnitude_mask, build_n_of_m_mask
from cptq.types import Candidate, LayerSpec, Unit


def check_candidates(candidates: tuple[Candidate, ...]) -> None:
    """Raise UsageError for a candidate whose rounding error cannot be computed here."""
    for candidate in candidates:
        if candidate.pattern not in ("none", UNSTRUCTURED) and not candidate.kept_of:
            raise UsageError(
                f"no metric can score the pattern {candidate.pattern!r}",
                allowed="grids, dense, with unstructured sparsity or with N:M",
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
    """Compute rounding errors on demand and keep the fitted grids until they are forgotten."""

    def __init__(self) -> None:
        self._grids: dict[tuple[str, Candidate], Grid] = {}

    def compute_errors(
        self, unit: Unit, weights: Sequence[Tensor], candidate: Candidate
    ) -> tuple[Tensor, ...]:
        """Return the error of each of a unit's layers, whose weights W_OI are given in order."""
        layers = zip(weights, unit.layers, strict=True)
        return tuple(self.compute_error(W_OI, spec, candidate) for W_OI, spec in layers)

    def compute_error(self, W_OI: Tensor, spec: LayerSpec, candidate: Candidate) -> Tensor:
        """Return W - Q(W) of one layer, (out, in), in the type of `W_OI`."""
        kept_OI = W_OI * build_sparse_mask(W_OI, candidate) if candidate.sparsity else W_OI
        if candidate.dense:
            return W_OI - kept_OI
        if candidate.float8:
            return W_OI - round_to_float8(kept_OI, candidate.float8).to(W_OI.dtype)
        scale_OG, zero_OG = self._grid(kept_OI, spec, candidate)
        kept_OGK = kept_OI.reshape(*scale_OG.shape, -1)
        spacing = Spacing(candidate.bits, candidate.levels)
        codes_OGK = encode(kept_OGK, spacing, scale_OG.to(W_OI.dtype), zero_OG)
        return W_OI - dequantize(codes_OGK.view(W_OI.shape), scale_OG, zero_OG, dtype=W_OI.dtype)

    def forget_unit(self, unit: Unit) -> None:
        """Drop the grids of a unit."""
        names = {spec.name for spec in unit.layers}
        self._grids = {key: grid for key, grid in self._grids.items() if key[0] not in names}

    def _grid(self, kept_OI: Tensor, spec: LayerSpec, candidate: Candidate) -> Grid:
        """Return the grid of a layer at a candidate, fitted when it is first needed."""
        key = spec.name, candidate
        if key not in self._grids:
            self._grids[key] = fit_grid(
                kept_OI,
                candidate.bits,
                resolve_group(spec.shape[1], candidate.group_size),
                symmetric=candidate.symmetric,
                scale_dtype=get_scale_type(spec, candidate),
                levels=candidate.levels,
            )
        return self._grids[key]


def build_sparse_mask(W_OI: Tensor, candidate: Candidate) -> Tensor:
    """Return which weights stay; of a tail of fewer than M inputs also the N largest.

    No format stores such a tail, so no plan contains one, but its unit still has a score.
    """
    if candidate.kept_of is None:
        return build_magnitude_mask(W_OI, candidate.sparsity)
    (kept, of), inputs = candidate.kept_of, W_OI.shape[1]
    return build_n_of_m_mask(pad(W_OI, (0, -inputs % of)), kept, of)[:, :inputs]
