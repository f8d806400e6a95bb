"""Compress one layer: choose its mask, solve for codes and scales, measure what was lost.

`compress_layer` is the only way from a dense weight to a compressed one: block-wise compression,
the models that a search tries and embeddings all call it, so that the same layer, Hessian and
candidate give the same weight everywhere.

Scales that float16 holds (`float16_scales`): llama.cpp stores one float16 scale per block. A
checkpoint in bfloat16 has scales in its own type, and those must be exact in float16 too, or an
export would change weights. The 8 bits of their fraction always fit; below 2^-17 the exponent does
not, above 65280 neither. A scale outside is pulled to the bound and the codes of its group are
rounded anew, which moves a weight by at most 2^-18 (groups of weights that small hardly exist).
(Scales of a float32 checkpoint are float16 anyhow: 16 bits more per group buy nothing.)

`k` scales (`numerics.super_scales`) are codes times a factor that float16 holds, in any type.

An asymmetric grid has its scales rounded while they are fitted (`float16_offset`, see
`numerics.grid`), in any type, so that llama.cpp's minimum, scale times zero point, is exact as
well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import torch
from torch import Tensor, nn

from cptq.checkpoint.weights import get_scale_type, get_weight, make_weight
from cptq.compression.restored import Restored
from cptq.compression.scores import SCORES, USUAL_MASKING, Masking
from cptq.compression.scores.choice import choose_mask
from cptq.layouts import Layout
from cptq.layouts.groups import resolve_group
from cptq.numerics.grid import (
    count_scale_bits,
    dequantize,
    round_scales,
)
from cptq.numerics.levels import Spacing
from cptq.numerics.masks import count_dropped
from cptq.numerics.reproducible import sum_over_rows
from cptq.numerics.scale_grids import ScaleType
from cptq.types import Candidate, CompressedLayer, LayerResult, LayerSpec

#: the smallest and largest bfloat16 all of whose neighbours inside are float16 as well
LEAST, MOST = 2.0**-17, 65280.0


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How many weights of a problem go: N of every M stay (`kept_of`), or `drop` go in all."""

    drop: int
    kept_of: tuple[int, int] | None = None

    def take_rows(self, rows: range, out: int) -> Selection:
        """Return the part of it for some of `out` outputs; the parts of all add up to it."""
        before, after = (self.drop * end // out for end in (rows.start, rows.stop))
        return replace(self, drop=after - before)


def choose_dtype(W_OI: Tensor) -> torch.dtype:
    """Return the type to compute with a weight in: float32, or its own where that is wider."""
    return torch.promote_types(W_OI.dtype, torch.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerProblem:
    """One linear: weight W_OI (out, in), its Hessian H_II = E[x x^T], and a grid.

    W is float32, or of a matrix of the vocabulary as the checkpoint stores it, which a compressor
    converts some rows at a time.
    `damping`: share of the mean diagonal that is added to H; the compressor's own where None.
    `float8` names a grid of 8-bit floats (`numerics.float8`), which has neither groups nor scales.
    Without a Hessian the inputs count as independent and equal. `group` divides `in`;
    `scale_dtype` is the storage type of the scales. Where there is a mask, bool (out, in), a
    weight outside it becomes 0. A `selection` has the mask chosen anew inside the sweep, where the
    compressor has one. An asymmetric solution has a `zero`, and with `float16_offset`
    float16 holds scale times zero point (`numerics.grid`). `levels` names unevenly spaced ones
    (`numerics.levels`), which then take the place of codes.
    """

    W_OI: Tensor
    H_II: Tensor | None
    bits: int
    group: int
    scale_dtype: ScaleType
    symmetric: bool = True
    float16_offset: bool = False
    mask_OI: Tensor | None = None
    selection: Selection | None = None
    damping: float | None = None
    float8: str = ""
    levels: str = ""

    def damp(self, damping: float) -> LayerProblem:
        """Return the problem with another damping."""
        return replace(self, damping=damping)

    def split_rows(self, size: int, dtype: torch.dtype) -> Iterator[LayerProblem]:
        """Yield the problem of `size` outputs after the other, the weight in a type.

        None depends on another's.
        """
        for start in range(0, len(self.W_OI), size):
            stop = min(start + size, len(self.W_OI))
            mask_OI = None if self.mask_OI is None else self.mask_OI[start:stop]
            selection = self.selection
            if selection is not None:
                selection = selection.take_rows(range(start, stop), len(self.W_OI))
            W_OI = self.W_OI[start:stop].to(dtype)
            yield replace(self, W_OI=W_OI, mask_OI=mask_OI, selection=selection)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerSolution:
    """codes int8 (out, in), scale (out, in / group), zero int8 of that shape where the grid is
    asymmetric, the mask where it was chosen on the way (else it is the problem's), and notes for
    the report. A masked weight has the code of 0. Codes on a grid of
    8-bit floats are those floats, and the scale is 1."""

    codes_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor | None = None
    mask_OI: Tensor | None = None
    notes: tuple[str, ...] = ()


Compressor = Callable[[LayerProblem], LayerSolution]


def compress_layer(
    spec: LayerSpec,
    W_OI: Tensor,
    H_II: Tensor | None,
    candidate: Candidate,
    method: Compressor,
    layout: Layout,
    *,
    held_out_II: Tensor | None = None,
    float16_scales: bool = False,
    masking: Masking = USUAL_MASKING,
    measure_output: bool = True,
) -> CompressedLayer:
    """Compress one layer and measure what was lost.

    Args:
        spec: of the layer.
        W_OI: its dense weight, float32.
        H_II: second moment of its inputs, if known.
        candidate: what it becomes; not dense.
        method: an entry of `COMPRESSORS`.
        layout: counts the bytes.
        held_out_II: second moment of inputs that do not calibrate, to measure the output error on;
            without it the error is that on `H_II`.
        float16_scales: make every scale one that float16 holds, whatever the checkpoint's type.
        masking: how the weights that a sparse candidate keeps are chosen.
        measure_output: measure the output error if a moment is known, at the cost of two products
            with it.
    """
    asked = spec, W_OI, H_II, candidate, method, layout
    error_II = _choose_moment(H_II, held_out_II) if measure_output else None
    return _compress(*asked, float16_scales, masking, error_II, held_out_II is not None)


def compress_module(
    module: nn.Module,
    spec: LayerSpec,
    H_II: Tensor | None,
    candidate: Candidate,
    method: Compressor,
    layout: Layout,
    *,
    dtype: torch.dtype,
    target_OI: Tensor | None = None,
    held_out_II: Tensor | None = None,
    float16_scales: bool = False,
    masking: Masking = USUAL_MASKING,
) -> CompressedLayer:
    """Compress a layer in place: the module then computes with the compressed weight.

    `dtype` is the type in which the weight is multiplied out. `target_OI`: the weight to
    come near to instead of the dense one (`numerics.asymmetric_target`). The rest as in
    `compress_layer`.
    """
    error_II = _choose_moment(H_II, held_out_II)
    held_out = held_out_II is not None
    layer = _compress(
        spec,
        # a matrix of the vocabulary may be a third of the model: it stays as narrow as it is stored
        get_weight(module) if spec.block is None else get_weight(module).float(),
        H_II,
        candidate,
        method,
        layout,
        float16_scales,
        masking,
        error_II,
        held_out,
        target_OI,
    )
    make_weight(module, Restored(layer, layer.codes.device, dtype))
    return layer


def build_layer_problem(
    spec: LayerSpec,
    W_OI: Tensor,
    H_II: Tensor | None,
    candidate: Candidate,
    masking: Masking = USUAL_MASKING,
) -> LayerProblem:
    """Return the problem that a compressor solves to turn a layer into a candidate."""
    score = SCORES.get(masking.score)
    # a mask drawn by lot is the layer's own, whatever was compressed before it
    seed = crc32(f"{masking.seed} {spec.name}".encode())
    selection = None
    if candidate.sparsity and score.in_sweep:
        drop = count_dropped(candidate.sparsity, W_OI.numel())
        selection = Selection(drop=drop, kept_of=candidate.kept_of)
    return LayerProblem(
        W_OI=W_OI,
        H_II=H_II,
        bits=candidate.bits,
        group=resolve_group(spec.shape[1], candidate.group_size),
        scale_dtype=get_scale_type(spec, candidate),
        symmetric=candidate.symmetric,
        mask_OI=choose_mask(score, W_OI, H_II, candidate, seed),
        selection=selection,
        float8=candidate.float8,
        levels=candidate.levels,
    )


def solve_layer_problem(
    problem: LayerProblem, method: Compressor, *, float16_scales: bool = False
) -> LayerSolution:
    """Run a compressor; with `float16_scales` its scales are exact in float16 too."""
    if not float16_scales or problem.float8 or not isinstance(problem.scale_dtype, torch.dtype):
        return method(problem)
    if problem.scale_dtype is torch.bfloat16 and problem.symmetric:
        return _bound_scales(method(problem), Spacing(problem.bits, problem.levels))
    dtype = torch.bfloat16 if problem.scale_dtype is torch.bfloat16 else torch.float16
    return method(replace(problem, scale_dtype=dtype, float16_offset=not problem.symmetric))


def round_layer_scales(layer: CompressedLayer, scale_OG: Tensor, *, float16_scales: bool) -> Tensor:
    """Round other scales of a layer, float32, to what it may store: its type and its bounds.

    `float16_scales` as in `compress_layer`. Scales that the layer has already stay as they are.
    """
    candidate = layer.result.candidate
    if candidate.scales:
        return round_scales(scale_OG, get_scale_type(layer.spec, candidate))
    dtype = layer.scale.dtype
    if not float16_scales:
        return round_scales(scale_OG, dtype)
    if layer.zero is not None:
        return round_scales(scale_OG, dtype, count_scale_bits(layer.zero, candidate.bits))
    if dtype is torch.bfloat16:
        scale_OG = scale_OG.sign() * scale_OG.abs().clamp(LEAST, MOST)
    return round_scales(scale_OG, dtype)


def measure_layer(layer: CompressedLayer, W_OI: Tensor, H_II: Tensor | None) -> CompressedLayer:
    """Return a layer whose scales were changed with its errors of now.

    Args:
        layer: the layer.
        W_OI: its dense weight, float32.
        H_II: second moment of inputs that do not calibrate; None: the output error is not known.
    """
    stored = _Stored(layer.codes, layer.scale, layer.zero, layer.mask)
    result = replace(
        layer.result,
        weight_error=_measure_weight_error(W_OI, stored),
        output_error=None if H_II is None else _measure_output_error(W_OI, stored, H_II),
        held_out=H_II is not None,
    )
    return replace(layer, result=result)


def _compress(
    spec: LayerSpec,
    W_OI: Tensor,
    H_II: Tensor | None,
    candidate: Candidate,
    method: Compressor,
    layout: Layout,
    float16_scales: bool,
    masking: Masking,
    error_II: Tensor | None,
    held_out: bool,
    target_OI: Tensor | None = None,
) -> CompressedLayer:
    """Return the compressed layer, whose weight is multiplied out some rows at a time.

    The output error is measured on `error_II`, which is that of `held_out` inputs or of those that
    calibrate, and relative to the target, which is W where none is given.
    """
    began = time.perf_counter()
    if target_OI is None:
        target_OI = W_OI
    problem = build_layer_problem(spec, target_OI, H_II, candidate, masking)
    solution = solve_layer_problem(problem, method, float16_scales=float16_scales)
    codes_OI, scale_OG, zero_OG = solution.codes_OI, solution.scale_OG, solution.zero_OG
    mask_OI = problem.mask_OI if solution.mask_OI is None else solution.mask_OI
    stored = _Stored(codes_OI, scale_OG, zero_OG, mask_OI)
    weight_error = _measure_weight_error(W_OI, stored)
    output_error = None if error_II is None else _measure_output_error(target_OI, stored, error_II)
    result = LayerResult(
        name=spec.name,
        candidate=candidate,
        group_size=0 if problem.group == spec.shape[1] else problem.group,
        nbytes=sum(tensor.nbytes for tensor in layout.tensors(spec, candidate)),
        weight_error=weight_error,
        output_error=output_error,
        seconds=time.perf_counter() - began,
        held_out=held_out and output_error is not None,
        notes=_group_note(candidate, problem.group, spec) + solution.notes,
    )
    return CompressedLayer(
        spec=spec,
        result=result,
        codes=codes_OI,
        scale=scale_OG,
        zero=zero_OG,
        mask=mask_OI,
    )


class _Stored:
    """A weight (out, in) as it is stored, multiplied out in float32 some rows at a time."""

    def __init__(self, *parts: Tensor | None) -> None:
        #: codes, scale, zero point and mask; those that there are
        self._known = [part is not None for part in parts]
        self.matrices = [part for part in parts if part is not None]

    def multiply_out(self, rows: Sequence[Tensor]) -> Tensor:
        """Return the weight of some rows of `matrices`."""
        found = iter(rows)
        codes_RI, scale_RG, zero_RG, mask_RI = (next(found) if k else None for k in self._known)
        assert codes_RI is not None
        assert scale_RG is not None
        return dequantize(codes_RI, scale_RG, zero_RG, mask_RI, dtype=torch.float32)


def _bound_scales(solution: LayerSolution, spacing: Spacing) -> LayerSolution:
    """Pull bfloat16 scales into float16's range and round the codes of those groups anew."""
    old_OG, codes_OI = solution.scale_OG.float(), solution.codes_OI
    new_OG = old_OG.sign() * old_OG.abs().clamp(LEAST, MOST)
    if torch.equal(old_OG, new_OG):
        return solution
    moved_OI = _rescale_codes(codes_OI, old_OG / new_OG, spacing)
    return replace(solution, codes_OI=moved_OI, scale_OG=new_OG.to(solution.scale_OG.dtype))


def _rescale_codes(codes_OI: Tensor, ratio_OG: Tensor, spacing: Spacing) -> Tensor:
    out, groups = ratio_OG.shape
    codes_OGK = codes_OI.float().view(out, groups, -1) * ratio_OG.unsqueeze(-1)
    return spacing.round(codes_OGK).to(torch.int8).view(codes_OI.shape)


def _choose_moment(H_II: Tensor | None, held_out_II: Tensor | None) -> Tensor | None:
    """Return the moment to measure the output error on."""
    return H_II if held_out_II is None else held_out_II


def _measure_weight_error(W_OI: Tensor, stored: _Stored) -> float:
    """Return |W - Q|^2 / |W|^2."""
    lost = sum_over_rows(
        lambda W_RI, *rows: (W_RI - stored.multiply_out(rows)).square(), W_OI, *stored.matrices
    )
    return _divide(lost, sum_over_rows(lambda W_RI: W_RI.float().square(), W_OI))


def _measure_output_error(W_OI: Tensor, stored: _Stored, H_II: Tensor) -> float:
    """Return the relative squared error of the output."""

    def compute_energy(W_RI: Tensor) -> Tensor:
        """Return what adds up to E|x W^T|^2 for inputs with second moment H."""
        return (W_RI.float() @ H_II).mul_(W_RI)

    lost = sum_over_rows(
        lambda W_RI, *rows: compute_energy(W_RI - stored.multiply_out(rows)),
        W_OI,
        *stored.matrices,
    )
    return _divide(lost, sum_over_rows(compute_energy, W_OI))


def _divide(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _group_note(candidate: Candidate, group: int, spec: LayerSpec) -> tuple[str, ...]:
    asked = candidate.group_size
    if group == asked or not asked or (group == spec.shape[1] and asked >= spec.shape[1]):
        return ()
    got = "one scale per channel" if group == spec.shape[1] else f"groups of {group}"
    return (f"groups of {asked} do not divide {spec.shape[1]} inputs: {got}",)
