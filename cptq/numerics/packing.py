"""Signed codes to a dense bitstream of 32-bit words, and back.

What compressed-tensors >= 0.18 stores as `weight_packed`: code q becomes the unsigned value
u = q + 2^(b-1), and the values of one output row follow one another, least significant bit first,
so that value i occupies bits i*b .. i*b + b - 1 of the row and may straddle two words. A row ends
on a whole word; the bits that are left over are those of zeros. (Releases before 0.18 padded
3, 5, 6 and 7 bits to whole values per word: another layout, which is not written here.)

Method: 32 values of b bits fill exactly b words, so a row is handled as runs of 32 values, where
word and shift of each value are constants. Cost: O(out * in), int64 words of a block of rows at a
time. Limits: two-dimensional weights, packed along the inputs only. Shapes: codes_OI int8
(out, in), packed_OP int32 (out, ceil(in * b / 32)).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: values in one run; as many bits as a word has
RUN = 32
#: values handled at once, each of which takes 8 bytes and some copies
CHUNK = 1 << 22
PACKABLE = range(2, 9)


def packed_words(in_features: int, bits: int) -> int:
    """32-bit words that one row of `in_features` codes takes."""
    return -(-in_features * bits // 32)


def pack_rows(codes_OI: Tensor, bits: int) -> Tensor:
    """Pack signed codes along the inputs.

    Args:
        codes_OI: int8 (out, in), in [-2^(bits-1), 2^(bits-1) - 1].
        bits: 2..8.

    Returns:
        int32 (out, ceil(in * bits / 32)), on the device of `codes_OI`.

    Raises:
        ValueError: other bits or types, or a code outside the range, which would spill into its
            neighbours.
    """
    _check(codes_OI, bits)
    rows = max(1, CHUNK // max(1, codes_OI.shape[1]))
    return torch.cat([_pack_chunk(chunk_RI, bits) for chunk_RI in codes_OI.split(rows)])


def unpack_rows(packed_OP: Tensor, bits: int, in_features: int) -> Tensor:
    """The inverse of `pack_rows`: int8 (out, in_features)."""
    rows = max(1, CHUNK // max(1, in_features))
    parts = [_unpack_chunk(chunk_RP, bits, in_features) for chunk_RP in packed_OP.split(rows)]
    return torch.cat(parts)


def _check(codes_OI: Tensor, bits: int) -> None:
    if bits not in PACKABLE:
        raise ValueError(f"{bits} bits cannot be packed; 2..8 can")
    if codes_OI.dtype is not torch.int8 or codes_OI.ndim != 2:
        raise ValueError(f"int8 codes (out, in) wanted, got {codes_OI.dtype} {codes_OI.shape}")
    half = 1 << (bits - 1)
    if codes_OI.numel() and not -half <= int(codes_OI.min()) <= int(codes_OI.max()) < half:
        raise ValueError(f"a code lies outside [{-half}, {half - 1}], the range of {bits} bits")


def _places(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Word and shift of each of the 32 values of a run."""
    first_bit = torch.arange(RUN, device=device) * bits
    return first_bit // 32, first_bit % 32


def _pack_chunk(codes_RI: Tensor, bits: int) -> Tensor:
    rows, inputs = codes_RI.shape
    runs = -(-inputs // RUN)
    unsigned_RI = codes_RI.to(torch.int64) + (1 << (bits - 1))
    padded_RI = torch.nn.functional.pad(unsigned_RI, (0, runs * RUN - inputs))
    word, shift = _places(bits, codes_RI.device)
    shifted_RGV = padded_RI.view(rows, runs, RUN) << shift
    words_RGW = torch.zeros(rows, runs, bits + 1, dtype=torch.int64, device=codes_RI.device)
    # no two values share a bit, so adding is or-ing
    words_RGW.index_add_(2, word, shifted_RGV & 0xFFFFFFFF)
    words_RGW.index_add_(2, word + 1, shifted_RGV >> 32)
    words_RP = words_RGW[..., :bits].reshape(rows, runs * bits)[:, : packed_words(inputs, bits)]
    return _signed(words_RP).to(torch.int32)


def _signed(words: Tensor) -> Tensor:
    """Words 0 .. 2^32 - 1 as the int32 of the same bits."""
    return words - ((words >> 31) << 32)


def _unpack_chunk(packed_RP: Tensor, bits: int, inputs: int) -> Tensor:
    rows, words = packed_RP.shape
    runs = -(-inputs // RUN)
    words_RP = packed_RP.to(torch.int64) & 0xFFFFFFFF
    padded_RP = torch.nn.functional.pad(words_RP, (0, runs * bits - words))
    # a word of zeros after each run, which the last value may look into
    words_RGW = torch.nn.functional.pad(padded_RP.view(rows, runs, bits), (0, 1))
    word, shift = _places(bits, packed_RP.device)
    pair_RGV = words_RGW[..., word] | (words_RGW[..., word + 1] << 32)
    unsigned_RGV = (pair_RGV >> shift) & ((1 << bits) - 1)
    return (unsigned_RGV - (1 << (bits - 1))).to(torch.int8).view(rows, -1)[:, :inputs].contiguous()
