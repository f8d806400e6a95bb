"""`gptq`: scales fitted first, then one column sweep with error compensation.

Source: GPTQ (Frantar et al., arXiv 2210.17323) with the three options its authors' code recommends:
activation order (inputs with the largest H_jj first), static groups (scales fitted on the dense
weight, so that groups stay runs of neighbours whatever the order), MSE-clipped grids.

Departures, with the output error they leave on smollm2-135m-dithered at 3 bits, group 64
(geometric mean over 16 linears, in 1/1000 of the output; plain GPTQ with signed scales 8.28):
- the clipping error of column j is weighted by 1 / U_jj^2, what an error there costs once the
  columns after it have made up for it (7.72; weighted by H_jj instead: 8.49);
- after the sweep the scales are fitted to the codes in the metric of H, `numerics.refit` (7.58).
Weights of inputs that are zero in every calibration token are rounded to nearest, as such inputs do
fire on other text (GPTQ's code sets them to 0); they hardly count where scales are fitted.
Left out: coordinate descent on the codes takes a further 6% off for five times the seconds.

An asymmetric grid has its zero points fitted with the scales. Under a mask the weights that it
leaves out are projected onto 0 and the others make up for it: SparseGPT's update (arXiv
2301.00774), with the mask chosen beforehand; or inside the sweep, jointly with rounding, where the
problem has a `selection` (`numerics.sweep_mask`).

Cost: a factorisation of in^3 / 3, its inverse and the sweep, out * in^2. Memory: H, and its factor
or its damped copy, in^2 floats each.
Where H cannot be factored even with full damping, the layer is rounded to nearest, with a note.
Without H the inputs count as independent and equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cptq.compression import nearest
from cptq.compression.layer import LayerProblem, LayerSolution, Selection, choose_dtype
from cptq.numerics.float8 import round_to_float8
from cptq.numerics.grid import Grid, count_scale_bits, fit_grid, get_code_range
from cptq.numerics.hessian import add_damping, factor_damped_inverse, find_dead_inputs
from cptq.numerics.levels import Spacing
from cptq.numerics.refit import refit_scales
from cptq.numerics.sweep import sweep_columns
from cptq.numerics.sweep_mask import SweepMask

#: share of the mean diagonal added to H
DAMPING = 0.01
#: what an error at a dead input counts where scales are fitted, relative to one at a live input: so
#: little that live inputs lose nothing, and enough for a group of dead inputs to be fitted
DEAD_SHARE = 1e-3
#: weights that are rounded at once, and the least number of outputs: every step of the sweep holds
#: some copies of them
CHUNK, LEAST_ROWS = 1 << 22, 1024
#: of an expert to which no token was routed, say
UNSEEN = "no calibration token reaches it: rounded to nearest"


def compress(problem: LayerProblem) -> LayerSolution:
    """Round with error compensation; fall back to nearest, with a note, if H is unusable."""
    W_OI, H_II = problem.W_OI, problem.H_II
    if H_II is None:
        H_II = torch.eye(W_OI.shape[1], dtype=choose_dtype(W_OI), device=W_OI.device)
    dead_I = find_dead_inputs(H_II)
    if bool(dead_I.all()):
        return replace(nearest.compress(problem), notes=(UNSEEN,))
    order_I = _choose_order(H_II, problem.selection)
    asked = DAMPING if problem.damping is None else problem.damping
    U_II, used = factor_damped_inverse(H_II, asked, order_I)
    if U_II is None:
        solution = nearest.compress(problem)
        note = "the Hessian could not be factored even with full damping: rounded to nearest"
        return replace(solution, notes=(note,))
    notes = (f"damping raised from {asked:g} to {used:g}",) if used != asked else ()
    parts = problem.split_rows(max(LEAST_ROWS, CHUNK // W_OI.shape[1]), H_II.dtype)
    rounded = [_round_rows(rows, U_II, order_I, dead_I) for rows in parts]
    solution = LayerSolution(
        codes_OI=torch.cat([part.codes_OI for part in rounded]),
        scale_OG=torch.cat([part.scale_OG for part in rounded]),
        zero_OG=_join([part.zero_OG for part in rounded]),
        mask_OI=_join([part.mask_OI for part in rounded]),
        notes=notes,
    )
    if problem.float8:
        return solution
    del U_II  # no more than one other matrix beside H at a time
    damped_II = add_damping(H_II, used, dead_share=DEAD_SHARE)
    return replace(solution, scale_OG=_refit(problem, damped_II, solution))


def _join(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Join what some outputs have; None where none has it."""
    known = [part for part in parts if part is not None]
    return torch.cat(known) if known else None


def _choose_order(H_II: Tensor, selection: Selection | None) -> Tensor:
    """Return inputs by falling second moment.

    In whole runs of M where N of M are to be chosen; as they are where a share is, since every run
    drops the same share, and sorted runs would not be alike.
    """
    diagonal_I = H_II.diagonal()
    if selection is None:
        return diagonal_I.argsort(descending=True, stable=True)
    if selection.kept_of is None:
        return torch.arange(len(diagonal_I), device=H_II.device)
    of = selection.kept_of[1]
    order_B = diagonal_I.view(-1, of).sum(1).argsort(descending=True, stable=True)
    return (order_B.unsqueeze(1) * of + torch.arange(of, device=order_B.device)).flatten()


def _round_rows(
    problem: LayerProblem, U_II: Tensor, order_I: Tensor, dead_I: Tensor
) -> LayerSolution:
    """Return codes, scales, zero points and masks of some outputs."""
    W_OI = problem.W_OI
    if problem.float8:
        codes_OI = _sweep_float8(W_OI, U_II, order_I, problem.float8)
        return LayerSolution(codes_OI=codes_OI, scale_OG=torch.ones_like(W_OI[:, :1]))
    cost_I = _compute_error_cost(U_II, order_I, dead_I)
    scale_OG, zero_OG = _fit_grid(W_OI, cost_I, problem)
    mask = _prepare_mask(problem, cost_I[order_I])
    codes_OI = _sweep(W_OI, U_II, order_I, scale_OG, zero_OG, problem, mask)
    mask_OI = None if mask is None else _restore_order(mask.mask_IO, order_I)
    return LayerSolution(codes_OI=codes_OI, scale_OG=scale_OG, zero_OG=zero_OG, mask_OI=mask_OI)


def _refit(problem: LayerProblem, damped_II: Tensor, solution: LayerSolution) -> Tensor:
    """Return the scales (out, groups) that serve the codes best."""
    codes_OI, scale_OG, zero_OG = solution.codes_OI, solution.scale_OG, solution.zero_OG
    steps_OI = codes_OI if zero_OG is None else _count_steps(codes_OI, zero_OG)
    limited_OG = _limit_precision(zero_OG, problem)
    stored = problem.scale_dtype
    return refit_scales(problem.W_OI, damped_II, steps_OI, scale_OG, limited_OG, scale_dtype=stored)


def _prepare_mask(problem: LayerProblem, cost_I: Tensor) -> SweepMask | None:
    """Return what chooses the mask inside the sweep; `cost_I` in its order."""
    selection = problem.selection
    if selection is None:
        return None
    out, features = problem.W_OI.shape
    return SweepMask((features, out), cost_I, selection.drop, selection.kept_of)


def _fit_grid(W_OI: Tensor, cost_I: Tensor, problem: LayerProblem) -> Grid:
    """Fit scales, and zero points of an asymmetric grid, to what the mask keeps."""
    return fit_grid(
        W_OI if problem.mask_OI is None else W_OI * problem.mask_OI,
        problem.bits,
        problem.group,
        symmetric=problem.symmetric,
        scale_dtype=problem.scale_dtype,
        importance_I=cost_I,
        float16_offset=problem.float16_offset,
        levels=problem.levels,
    )


def _limit_precision(zero_OG: Tensor | None, problem: LayerProblem) -> Tensor | None:
    """Return the significant bits that each scale may have, where they are limited."""
    if zero_OG is None or not problem.float16_offset:
        return None
    return count_scale_bits(zero_OG, problem.bits)


def _count_steps(codes_OI: Tensor, zero_OG: Tensor) -> Tensor:
    """Return codes - zero (out, in), int16: how many scales a weight is away from 0."""
    out, groups = zero_OG.shape
    codes_OGK = codes_OI.to(torch.int16).view(out, groups, -1)
    return (codes_OGK - zero_OG.to(torch.int16).unsqueeze(-1)).view(out, -1)


def _compute_error_cost(U_II: Tensor, order_I: Tensor, dead_I: Tensor) -> Tensor:
    """Return 1 / U_jj^2 per input (in,), in natural order: what a squared error there costs."""
    cost_I = torch.empty_like(U_II.diagonal())
    cost_I[order_I] = U_II.diagonal().reciprocal().square()
    return torch.where(dead_I, DEAD_SHARE * cost_I[~dead_I].min(), cost_I)


def _sweep(
    W_OI: Tensor,
    U_II: Tensor,
    order_I: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor | None,
    problem: LayerProblem,
    mask: SweepMask | None,
) -> Tensor:
    """Return codes (out, in) int8, or uneven levels, after one sweep on fixed grids."""
    spacing, (low, high) = Spacing(problem.bits, problem.levels), get_code_range(problem.bits)
    codes_IO = torch.empty(W_OI.shape[::-1], dtype=torch.int8, device=W_OI.device)
    scale_GO = scale_OG.to(W_OI.dtype).T.contiguous()
    zero_GO = None if zero_OG is None else zero_OG.to(W_OI.dtype).T.contiguous()
    mask_IO = None if problem.mask_OI is None else problem.mask_OI.T[order_I].contiguous()
    mask_IO = mask_IO if mask is None else mask.mask_IO
    group_of = (order_I // problem.group).tolist()

    def project(position: int, column_O: Tensor) -> Tensor:
        scale_O = scale_GO[group_of[position]]
        code_O = torch.div(column_O, scale_O)
        zero_O = None if zero_GO is None else zero_GO[group_of[position]]
        if zero_O is None:
            code_O = spacing.round(code_O)
        else:
            code_O.round_().add_(zero_O).clamp_(low, high)
        if mask_IO is not None:
            code_O = torch.where(mask_IO[position], code_O, 0.0 if zero_O is None else zero_O)
        codes_IO[position] = code_O
        if zero_O is not None:
            code_O.sub_(zero_O)
        return code_O.mul_(scale_O)

    sweep_columns(W_OI.T[order_I].contiguous(), U_II, project, mask=mask)
    return _restore_order(codes_IO, order_I)


def _sweep_float8(W_OI: Tensor, U_II: Tensor, order_I: Tensor, name: str) -> Tensor:
    """Return 8-bit floats (out, in) after one sweep in `order_I`."""

    def project(_position: int, column_O: Tensor) -> Tensor:
        return round_to_float8(column_O, name).to(column_O.dtype)

    rounded_IO, _ = sweep_columns(W_OI.T[order_I].contiguous(), U_II, project)
    return round_to_float8(_restore_order(rounded_IO, order_I), name)


def _restore_order(found_IO: Tensor, order_I: Tensor) -> Tensor:
    """Return (out, in) with inputs in natural order."""
    restored_IO = torch.empty_like(found_IO)
    restored_IO[order_I] = found_IO
    return restored_IO.T.contiguous()
