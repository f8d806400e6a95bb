"""Round to levels, evenly spaced or not, and turn levels into codes and back.

A weight w of a group with scale s is stored as the code u of its nearest level,

    u(w) = argmin_u |w / s - l_u|,      w' = l_u s.

Even spacing, l_u = u - 2^(b-1), is best for weights that are equally likely everywhere. Weights of
a group are nearly normal, and the quantizer with the least squared error is then narrow around 0
and wide outside. Its conditions are Lloyd's (Least squares quantization in PCM, 1957; IEEE 1982)
and Max's (Quantizing for minimum distortion, 1960): boundaries lie in the middle between levels,
and a level is the mean of what is rounded to it. NF4 (QLoRA, Dettmers et al., arXiv 2305.14314,
section 3) takes quantiles instead, and ggml's IQ4_NL a table of 8-bit integers, as here.

Departures: Lloyd's conditions are met together with the scale of a group of 32, fitted by the
search of `numerics.grid` with either sign, each weight counting s^2 (`scripts/fit_levels`). One
table per width serves all tensors: tables fitted to each of 15 linears of smollm2-135m-dithered
were equal to within a step of 1/31 of the largest level. Each table against even spacing, with
`row` scales among 32 inputs: squared error of normal weights rounded to nearest, and output error
of GPTQ on held-out inputs (geometric mean of 8 linears of smollm2-135m-dithered):

| bits                    | 2    | 3    | 4    | 5    | 6    |
|-------------------------|------|------|------|------|------|
| normal weights, nearest | 0.87 | 0.87 | 0.83 | 0.81 | 0.85 |
| smollm2, GPTQ           | 0.88 | 0.85 | 0.78 | 0.74 | 0.84 |

Levels are integers, so a middle between two is a multiple of 1/2, and floor(2 w / s) alone says
which level is nearest: one lookup in a table of 512, exact, whatever the number of levels. A weight
in the middle takes the upper level.

Cost: about 2 ns per weight instead of 0.2 for even spacing. Limits: widths that `layouts.levels`
has; no 0 among the levels, so no masks and no zero points, and a weight that is 0 becomes the level
next to it: in a group of zeros with `row` scales up to 0.018, 0.007, 0.003, 0.001, 0.001 of the
root mean square of the other weights of its row at 2 to 6 bits. Shapes: any.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from cptq.layouts.levels import get_levels

#: floor(2 x) of levels in -127..127 lies in -HALVES..HALVES - 1
HALVES = 256
#: no code of fewer than 8 bits
NO_LEVEL = 127


@dataclass(frozen=True, slots=True)
class Spacing:
    """The levels of a width: those of a table (`layouts.levels`), or without a name even ones."""

    bits: int
    levels: str = ""

    @property
    def ends(self) -> tuple[int, int]:
        """The sizes of the smaller and the larger of the outermost levels."""
        if not self.levels:
            return (1 << (self.bits - 1)) - 1, 1 << (self.bits - 1)
        table = get_levels(self.levels, self.bits)
        return min(-table[0], table[-1]), max(-table[0], table[-1])

    def round(self, steps: Tensor) -> Tensor:
        """Return the nearest level of each number (weights divided by scales), in its type.

        The memory of `steps` may be used. NaN stays NaN.
        """
        if not self.levels:
            half = 1 << (self.bits - 1)
            return steps.round_().clamp_(-half, half - 1)
        place = steps.mul_(2).floor_().clamp_(-HALVES, HALVES - 1)
        place = place.nan_to_num_(nan=HALVES).add_(HALVES).to(torch.int32)
        table = _list_nearest(self, steps.dtype, steps.device)
        return table.index_select(0, place.reshape(-1)).view(steps.shape)


@cache
def _list_nearest(spacing: Spacing, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the nearest level of numbers in [k/2, (k + 1)/2), k from -HALVES; NaN last."""
    table = torch.tensor(get_levels(spacing.levels, spacing.bits), dtype=torch.float64)
    inside = (torch.arange(-HALVES, HALVES, dtype=torch.float64) + 0.5) / 2
    nearest = torch.bucketize(inside, (table[1:] + table[:-1]) / 2)
    return torch.cat([table[nearest], table.new_full((1,), torch.nan)]).to(dtype).to(device)


def to_codes(levels_OI: Tensor, spacing: Spacing) -> Tensor:
    """Return the signed codes, int8, of levels, int8; even ones are codes already.

    Raises:
        ValueError: a number is no level.
    """
    if not spacing.levels:
        return levels_OI
    device, half = levels_OI.device, 1 << (spacing.bits - 1)
    table = torch.tensor(get_levels(spacing.levels, spacing.bits), device=device)
    # the code of every byte; NO_LEVEL where it is none
    codes_B = torch.full((256,), NO_LEVEL, dtype=torch.int8, device=device)
    codes_B[table + 128] = torch.arange(-half, half, dtype=torch.int8, device=device)
    found = codes_B.index_select(0, (levels_OI.to(torch.int32) + 128).reshape(-1))
    if bool((found == NO_LEVEL).any()):
        raise ValueError(f"a number is no {spacing.levels} level of {spacing.bits} bits")
    return found.view(levels_OI.shape)


def to_levels(codes_OI: Tensor, spacing: Spacing) -> Tensor:
    """Return the levels, int8, of signed codes, int8; the inverse of `to_codes`."""
    if not spacing.levels:
        return codes_OI
    values = get_levels(spacing.levels, spacing.bits)
    table = torch.tensor(values, dtype=torch.int8, device=codes_OI.device)
    place = codes_OI.to(torch.int32).add_(1 << (spacing.bits - 1))
    return table.index_select(0, place.reshape(-1)).view(codes_OI.shape)
