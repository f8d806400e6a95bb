#!/usr/bin/env python3
"""What `scripts/fit_levels` runs: Lloyd's conditions for levels, met together with scales.

Repeat on fresh groups of normal weights w: find each group's scale s (every share of the range,
with either sign, refitted twice in closed form), round w / s to the nearest level, and move each
level to the mean of what was rounded to it, every weight counting s^2. The mean over the second
half of the rounds, times the span at which rounding to integers loses least, is the table.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

#: bits -> groups in a round
GROUPS = {2: 30_000, 3: 20_000, 4: 16_000, 5: 12_000, 6: 8_000}
ROUNDS, SHARES, REFITS = 100, 12, 2
#: groups on which the tables are compared
JUDGED = 8_000
#: bits -> largest level, see `cptq.layouts.levels`
LARGEST = {2: 32, 3: 64, 4: 64, 5: 127, 6: 127}
#: how uneven the levels are at the start
BEND = 1.6


def quantize(w_NK: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales (groups, 1) with the least squared error, and that error."""
    middles = (levels[1:] + levels[:-1]) / 2
    widest_N1 = w_NK.abs().amax(1, keepdim=True) / levels.abs().max()
    narrowest = 0.5 if len(levels) < 16 else 0.7
    best_N1, least_N1 = widest_N1, torch.full_like(widest_N1, torch.inf)

    def look_up(s_N1: Tensor) -> Tensor:
        return levels[torch.bucketize((w_NK / s_N1).contiguous(), middles)]

    for share in torch.linspace(1.1, narrowest, SHARES).tolist():
        for sign in (1, -1):
            s_N1 = sign * share * widest_N1
            for _ in range(REFITS):
                q_NK = look_up(s_N1)
                fitted_N1 = (q_NK * w_NK).sum(1, keepdim=True) / q_NK.square().sum(1, keepdim=True)
                s_N1 = torch.where(fitted_N1 == 0, s_N1, fitted_N1)
            error_N1 = (look_up(s_N1) * s_N1 - w_NK).square().sum(1, keepdim=True)
            best_N1 = torch.where(error_N1 < least_N1, s_N1, best_N1)
            least_N1 = torch.minimum(error_N1, least_N1)
    return best_N1, least_N1


def fit(bits: int, group: int, generator: torch.Generator) -> Tensor:
    """Return levels whose largest has the size 1."""
    count = 1 << bits
    levels = torch.sinh(BEND * torch.linspace(-1, 1, count + 1, dtype=torch.float64)[:-1])
    levels = levels / levels.abs().max()
    total, kept = torch.zeros_like(levels), 0
    for number in range(ROUNDS):
        w_NK = torch.randn(GROUPS[bits], group, dtype=torch.float64, generator=generator)
        s_N1, _ = quantize(w_NK, levels)
        place = torch.bucketize((w_NK / s_N1).flatten(), (levels[1:] + levels[:-1]) / 2)
        weight = s_N1.square().expand_as(w_NK).flatten()
        mass = torch.zeros_like(levels).scatter_add_(0, place, weight)
        moment = torch.zeros_like(levels).scatter_add_(0, place, (s_N1 * w_NK).flatten())
        levels = torch.where(mass > 0, moment / mass.clamp_min(1e-30), levels).sort().values
        levels = levels / levels.abs().max()
        if number >= ROUNDS // 2:
            total, kept = total + levels, kept + 1
    return total / kept


def measure(levels: Tensor, group: int, generator: torch.Generator) -> float:
    """Return the mean squared error of rounding normal weights."""
    w_NK = torch.randn(JUDGED, group, dtype=torch.float64, generator=generator)
    return float(quantize(w_NK, levels.double())[1].mean()) / group


def round_levels(levels: Tensor, largest: int) -> Tensor:
    """Return integers in the proportion that comes nearest to these levels."""
    spans = range(max(largest * 3 // 4, 8), largest + 1)
    tables = [(levels * span).round() for span in spans]
    losses = [
        float((table / span - levels).square().mean())
        for table, span in zip(tables, spans, strict=True)
    ]
    return tables[losses.index(min(losses))]


def _read_width(word: str) -> int:
    """Return a width; `choices` would refuse that none is given."""
    if word not in map(str, GROUPS):
        raise argparse.ArgumentTypeError(f"{word!r} is not among {', '.join(map(str, GROUPS))}")
    return int(word)


def main() -> None:
    """Fit the asked widths and print a line for each."""
    parser = argparse.ArgumentParser(prog="scripts/fit_levels")
    parser.add_argument("bits", nargs="*", type=_read_width)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--seed", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for bits in given.bits or GROUPS:
        generator = torch.Generator().manual_seed(given.seed)
        table = round_levels(fit(bits, given.group, generator), LARGEST[bits])
        even = torch.arange(-(1 << (bits - 1)), 1 << (bits - 1))
        own, plain = (
            measure(levels, given.group, torch.Generator().manual_seed(given.seed + 1))
            for levels in (table, even)
        )
        print(f"{bits}: {tuple(table.int().tolist())}")
        print(f"   squared error {own:.5f}, even levels {plain:.5f}, ratio {own / plain:.3f}")


if __name__ == "__main__":
    main()
