"""Pack small integers into a dense bitstream of 32-bit words, and unpack them.

What compressed-tensors >= 0.18 stores as `weight_packed`: code q becomes the unsigned value
u = q + 2^(b-1), and the values of one output row follow one another, least significant bit first,
so that value i occupies bits i*b .. i*b + b - 1 of the row and may straddle two words. A row ends
on a whole word; the bits left over are 0. (Releases before 0.18 padded
3, 5, 6 and 7 bits to whole values per word: another layout, not written here.)

Method: 32 values of b bits fill exactly b words, so a row is handled as runs of 32 values, where
word and shift of each value are constants. Unpacking is 32 strided writes of int32 arithmetic and
allocates nothing but bytes: it runs in every forward pass of a packed model. Packing happens
once. Cost: O(out * in). Limits: two dimensions, packed along the last. Shapes: codes_OI int8
(out, in), values_OI uint8 (out, in), packed_OP int32 (out, ceil(in * b / 32)).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: values in one run; as many bits as a word has
RUN = 32
#: values handled at once, each of which takes 8 bytes and some copies
CHUNK = 1 << 22
#: widths of signed codes; unsigned values may also have 1 bit
PACKABLE = range(2, 9)


def count_words(in_features: int, bits: int) -> int:
    """Return the 32-bit words that one row of `in_features` values takes."""
    return -(-in_features * bits // 32)


def pack_rows(codes_OI: Tensor, bits: int) -> Tensor:
    """Pack signed codes along the inputs.

    Args:
        codes_OI: int8 (out, in), in [-2^(bits-1), 2^(bits-1) - 1].
        bits: 2..8.

    Returns:
        int32 (out, ceil(in * bits / 32)), on the device of `codes_OI`.

    Raises:
        ValueError: other bits or types, or a code outside the range, which would overwrite its
            neighbours.
    """
    _check(codes_OI, bits)
    offset = 1 << (bits - 1)
    rows = max(1, CHUNK // max(1, codes_OI.shape[1]))
    chunks = codes_OI.split(rows)
    return torch.cat([_pack_chunk(chunk_RI.to(torch.int64) + offset, bits) for chunk_RI in chunks])


def unpack_rows(packed_OP: Tensor, bits: int, in_features: int) -> Tensor:
    """Invert `pack_rows`: return int8 (out, in_features)."""
    # u - 2^(b-1) modulo 256, read as a signed byte
    values_OI = unpack_values(packed_OP, bits, in_features)
    return values_OI.sub_(1 << (bits - 1)).view(torch.int8)


def pack_values(values_OI: Tensor, bits: int) -> Tensor:
    """Pack unsigned values along the inputs.

    Args:
        values_OI: uint8 or bool (out, in), below 2^bits.
        bits: 1..8.

    Returns:
        int32 (out, ceil(in * bits / 32)).

    Raises:
        ValueError: other bits, or a value that needs more.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"values of {bits} bits cannot be packed; 1..8 can")
    if values_OI.numel() and int(values_OI.max()) >= 1 << bits:
        raise ValueError(f"a value needs more than {bits} bits")
    rows = max(1, CHUNK // max(1, values_OI.shape[1]))
    return torch.cat([_pack_chunk(chunk.to(torch.int64), bits) for chunk in values_OI.split(rows)])


def unpack_values(packed_OP: Tensor, bits: int, in_features: int) -> Tensor:
    """Invert `pack_values`: return uint8 (out, in_features)."""
    rows = max(1, CHUNK // max(1, in_features))
    parts = [_unpack_chunk(chunk_RP, bits, in_features) for chunk_RP in packed_OP.split(rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _check(codes_OI: Tensor, bits: int) -> None:
    if bits not in PACKABLE:
        raise ValueError(f"{bits} bits cannot be packed; 2..8 can")
    if codes_OI.dtype is not torch.int8 or codes_OI.ndim != 2:
        raise ValueError(f"int8 codes (out, in) expected, got {codes_OI.dtype} {codes_OI.shape}")
    limit = 1 << (bits - 1)
    if codes_OI.numel() and not -limit <= int(codes_OI.min()) <= int(codes_OI.max()) < limit:
        raise ValueError(f"a code lies outside [{-limit}, {limit - 1}], the range of {bits} bits")


def _pack_chunk(unsigned_RI: Tensor, bits: int) -> Tensor:
    rows, inputs = unsigned_RI.shape
    runs = -(-inputs // RUN)
    padded_RI = torch.nn.functional.pad(unsigned_RI, (0, runs * RUN - inputs))
    first_bit = torch.arange(RUN, device=unsigned_RI.device) * bits
    word, shift = first_bit // 32, first_bit % 32
    shifted_RGV = padded_RI.view(rows, runs, RUN) << shift
    words_RGW = torch.zeros(rows, runs, bits + 1, dtype=torch.int64, device=unsigned_RI.device)
    # no two values share a bit, so the sum is a bitwise or
    words_RGW.index_add_(2, word, shifted_RGV & 0xFFFFFFFF)
    words_RGW.index_add_(2, word + 1, shifted_RGV >> 32)
    words_RP = words_RGW[..., :bits].reshape(rows, runs * bits)[:, : count_words(inputs, bits)]
    return _to_signed(words_RP).to(torch.int32)


def _to_signed(words: Tensor) -> Tensor:
    """Return words 0 .. 2^32 - 1 as the int32 of the same bits."""
    return words - ((words >> 31) << 32)


def _unpack_chunk(packed_RP: Tensor, bits: int, inputs: int) -> Tensor:
    rows, words = packed_RP.shape
    runs = -(-inputs // RUN)
    padded_RP = torch.nn.functional.pad(packed_RP, (0, runs * bits - words))
    # words first, so that each step below reads and writes whole rows
    words_WRG = padded_RP.view(rows, runs, bits).permute(2, 0, 1).contiguous()
    values_RGV = torch.empty(rows, runs, RUN, dtype=torch.uint8, device=packed_RP.device)
    for value in range(RUN):
        values_RGV[..., value] = _extract_value(words_WRG, bits, *divmod(value * bits, 32))
    return values_RGV.view(rows, runs * RUN)[:, :inputs].contiguous()


def _extract_value(words_WRG: Tensor, bits: int, word: int, shift: int) -> Tensor:
    """Return one value of every run, int32; the sign that a right shift extends is masked off."""
    low, mask = words_WRG[word] >> shift, (1 << bits) - 1
    straddling = shift + bits - 32
    if straddling <= 0:
        return low & mask
    upper = (words_WRG[word + 1] & ((1 << straddling) - 1)) << (32 - shift)
    return (low & ((1 << (32 - shift)) - 1)) | upper
