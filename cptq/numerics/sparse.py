"""Pack sparse matrices of small integers: which weights are stored, and only their codes.

Two ways to encode which:

- `unstructured`: one bit per weight, 1 where it is stored (a bitmask, out x in), and one bitstream
  of the stored codes of the whole matrix, row after row. 1 + (1 - s) b bits a weight at sparsity s,
  fewer than the b of a dense bitstream only where s > 1 / b.
- `N:M`, M up to 8: of every M neighbouring inputs N are stored; which ones is one of C(M, N)
  patterns, numbered in lexicographic order: 3 bits for 2:4 and 7 for 4:8, 0.75 + b / 2 and
  0.875 + b / 2 bits a weight. The layout that NVIDIA's sparse tensor cores compute with keeps two
  2-bit positions for 2:4, 4 bits for every 4 weights (Mishra et al., arXiv 2104.08378).

A weight that is not stored is 0 whatever the grid, so an asymmetric grid keeps it exact too.

Cost: O(out * in). Limits: M above 8 would need a bitmask of its own; the reference scatters through
masks. Shapes: mask_OI bool (out, in), codes_OI int8, pattern_OB uint8 (out, in / M), kept_OK int8
(out, in N / M).
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from cptq.numerics.packing import RUN, unpack_values


def list_patterns(kept: int, of: int) -> tuple[tuple[int, ...], ...]:
    """Return which `kept` of `of` neighbours are stored, by pattern index."""
    return tuple(combinations(range(of), kept))


def gather_codes(codes_OI: Tensor, mask_OI: Tensor) -> Tensor:
    """Return the codes where the mask is True, row after row (count,)."""
    return codes_OI[mask_OI]


def scatter_codes(codes_N: Tensor, mask_OI: Tensor) -> Tensor:
    """Invert `gather_codes`: return (out, in) of the codes' type, 0 elsewhere.

    Raises:
        ValueError: there are more or fewer codes than places.
    """
    places = int(mask_OI.sum())
    if places != codes_N.numel():
        raise ValueError(f"{codes_N.numel()} codes for {places} places")
    codes_OI = torch.zeros(mask_OI.shape, dtype=codes_N.dtype, device=codes_N.device)
    return codes_OI.masked_scatter_(mask_OI, codes_N)


def unpack_range(stream_P: Tensor, bits: int, start: int, stop: int) -> Tensor:
    """Return values start..stop (uint8) of one long bitstream without unpacking those before."""
    first = start // RUN
    words_P = stream_P[first * bits : -(-stop * bits // 32)]
    values = unpack_values(words_P.unsqueeze(0), bits, stop - first * RUN)[0]
    return values[start - first * RUN :]


def split_n_of_m(codes_OI: Tensor, mask_OI: Tensor, kept: int, of: int) -> tuple[Tensor, Tensor]:
    """Return pattern indices (out, in / of) uint8, and the stored codes (out, in kept / of).

    Raises:
        ValueError: the inputs do not divide by `of`, or a block does not store exactly `kept`.
    """
    out, inputs = mask_OI.shape
    if inputs % of:
        raise ValueError(f"{inputs} inputs do not divide into blocks of {of}")
    mask_OBK = mask_OI.view(out, -1, of)
    if not bool((mask_OBK.sum(-1) == kept).all()):
        raise ValueError(f"a block of {of} does not store exactly {kept} weights")
    weight_K = torch.tensor([1 << place for place in range(of)], device=mask_OI.device)
    pattern_OB = _tabulate_patterns(kept, of, mask_OI.device)[(mask_OBK * weight_K).sum(-1)]
    return pattern_OB, codes_OI[mask_OI].view(out, inputs // of * kept)


def join_n_of_m(pattern_OB: Tensor, kept_OK: Tensor, kept: int, of: int) -> tuple[Tensor, Tensor]:
    """Invert `split_n_of_m`: return codes (out, in), 0 where none is stored, and the mask.

    Raises:
        ValueError: an index is not that of a pattern.
    """
    patterns = list_patterns(kept, of)
    if pattern_OB.numel() and int(pattern_OB.max()) >= len(patterns):
        raise ValueError(f"a pattern index is above {len(patterns) - 1}")
    out, blocks = pattern_OB.shape
    places = torch.tensor(patterns, device=pattern_OB.device)[pattern_OB.long()]
    codes_OBK = kept_OK.new_zeros(out, blocks, of)
    codes_OBK.scatter_(2, places, kept_OK.view(out, blocks, kept))
    mask_OBK = torch.zeros_like(codes_OBK, dtype=torch.bool)
    mask_OBK.scatter_(2, places, True)
    return codes_OBK.view(out, -1), mask_OBK.view(out, -1)


def _tabulate_patterns(kept: int, of: int, device: torch.device) -> Tensor:
    """Return the pattern index by the mask's bits read as a number."""
    index = torch.zeros(1 << of, dtype=torch.uint8, device=device)
    for number, places in enumerate(list_patterns(kept, of)):
        index[sum(1 << place for place in places)] = number
    return index
