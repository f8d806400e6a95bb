"""Kernels of the backend `triton`: products on a GPU, straight from the bits of the file.

The weight of a row n and an input k in group g is (q_nk - z_ng) s_ng (docs/format-packed.md), so

    y_mn = sum_g s_ng sum_{k in g} x_mk (q_nk - z_ng)  [+ b_n].

With uneven levels (`layouts.levels`) l_q takes the place of q - z, by a load from their table.

The inner sum has integer weights of at most 255 in size, which float16 and bfloat16 hold exactly,
and one scale per row and group multiplies it afterwards in float32: no weight is ever rounded. The
result is rounded once.

**Bits.** Codes are taken in units: the fewest whole words that hold whole codes (`count_unit` of
the backend: at 3 bits 3 words of 32 codes, at 4 bits one word of 8). A thread loads the words of a
unit once and shifts them apart in registers (`expand`), for every width alike. `REGULAR`: a unit
lies in one group, so that it has one scale; other groups (of 24, say) load a scale per code.

**One token** (`multiply_one`) reads all weights for little arithmetic. Each program multiplies few
whole rows; threads lie along the inputs, so a thread uses its inputs for all rows of the program,
and sums over threads are taken once, at the end: in a fixed order, with the same result each time.

**Up to some tens of tokens** (`multiply_many`): 16-row tensor-core tiles, whose cost does not
depend on how many of the 16 rows are used. Inputs are taken in chunks of BK that divide a group.
The sum over inputs is split among programs (`part`) until the processors are full, each writes
float32 sums, and `add_parts` adds them in a fixed order.

**Sources.** Splitting the inner dimension of quantized products of few rows: Hoque et al., arXiv
2402.00025 (with atomics). Dequantizing in registers before 16-row tensor-core tiles, for up to 16
tokens at the price of one: Marlin, Frantar et al., arXiv 2408.11743, which needs weights reordered
in advance; here they lie as in the file.

**Cost.** Per weight a shift, a mask, a subtraction, a conversion and a multiply-add. Memory: the
result, and float32 sums of parts x tokens x out.

**Limits.** `multiply_many` takes regular groups alone. float32 x are multiplied in full float32,
without tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read_values(words, index, keep, BITS: tl.constexpr):
    """Unsigned values `index` of the bitstreams that begin at `words`; 0 where not `keep`."""
    start = index * BITS
    shift = (start & 31).to(tl.uint32)
    place = words + (start >> 5)
    value = tl.load(place, mask=keep, other=0).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS != 0:
        straddles = tl.where(shift > 32 - BITS, keep, False)
        rest = tl.load(place + 1, mask=straddles, other=0).to(tl.uint32, bitcast=True)
        # in two steps: 32 at once, where shift is 0, is not defined
        value |= (rest << 1) << (31 - shift)
    return (value & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def read_word(row_R, first_U, width, keep_RU, place: tl.constexpr):
    """Word `place` of the units that begin at the words `first_U` of rows at the pointers row_R."""
    index_U = first_U + place
    keep_RU = keep_RU & (index_U < width)[None, :]
    word_RU = tl.load(row_R[:, None] + index_U[None, :], mask=keep_RU, other=0)
    return word_RU.to(tl.uint32, bitcast=True)


@triton.jit
def read_1(row_R, unit_U, width, keep_RU):
    """The word of each unit, as a tuple."""
    return (read_word(row_R, unit_U, width, keep_RU, 0),)


@triton.jit
def read_3(row_R, unit_U, width, keep_RU):
    """The 3 words of each unit."""
    first_U = unit_U * 3
    return (
        read_word(row_R, first_U, width, keep_RU, 0),
        read_word(row_R, first_U, width, keep_RU, 1),
        read_word(row_R, first_U, width, keep_RU, 2),
    )


@triton.jit
def read_5(row_R, unit_U, width, keep_RU):
    """The 5 words of each unit."""
    first_U = unit_U * 5
    return (
        read_word(row_R, first_U, width, keep_RU, 0),
        read_word(row_R, first_U, width, keep_RU, 1),
        read_word(row_R, first_U, width, keep_RU, 2),
        read_word(row_R, first_U, width, keep_RU, 3),
        read_word(row_R, first_U, width, keep_RU, 4),
    )


@triton.jit
def read_7(row_R, unit_U, width, keep_RU):
    """The 7 words of each unit."""
    first_U = unit_U * 7
    return (
        read_word(row_R, first_U, width, keep_RU, 0),
        read_word(row_R, first_U, width, keep_RU, 1),
        read_word(row_R, first_U, width, keep_RU, 2),
        read_word(row_R, first_U, width, keep_RU, 3),
        read_word(row_R, first_U, width, keep_RU, 4),
        read_word(row_R, first_U, width, keep_RU, 5),
        read_word(row_R, first_U, width, keep_RU, 6),
    )


@triton.jit
def get_code(words, J: tl.constexpr, BITS: tl.constexpr):
    """Code J of each unit."""
    code_RU = words[J * BITS // 32] >> (J * BITS % 32)
    if J * BITS % 32 + BITS > 32:
        code_RU |= words[J * BITS // 32 + 1] << (32 - J * BITS % 32)
    return code_RU & ((1 << BITS) - 1)


# Codes J, J + STEP, J + 2 STEP, ... of each unit along a new last dimension, which a thread holds.


@triton.jit
def get_2(words, J: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr):
    return tl.join(get_code(words, J, BITS), get_code(words, J + STEP, BITS))


@triton.jit
def get_4(words, J: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr):
    pairs = tl.join(get_2(words, J, 2 * STEP, BITS), get_2(words, J + STEP, 2 * STEP, BITS))
    return tl.reshape(pairs, (pairs.shape[0], pairs.shape[1], 4))


@triton.jit
def get_8(words, J: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr):
    pairs = tl.join(get_4(words, J, 2 * STEP, BITS), get_4(words, J + STEP, 2 * STEP, BITS))
    return tl.reshape(pairs, (pairs.shape[0], pairs.shape[1], 8))


@triton.jit
def get_16(words, J: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr):
    pairs = tl.join(get_8(words, J, 2 * STEP, BITS), get_8(words, J + STEP, 2 * STEP, BITS))
    return tl.reshape(pairs, (pairs.shape[0], pairs.shape[1], 16))


@triton.jit
def get_32(words, BITS: tl.constexpr):
    pairs = tl.join(get_16(words, 0, 2, BITS), get_16(words, 1, 2, BITS))
    return tl.reshape(pairs, (pairs.shape[0], pairs.shape[1], 32))


@triton.jit
def expand(row_R, unit_U, width, keep_RU, BITS: tl.constexpr):
    """Codes (rows, units, codes of a unit), int32, of rows of `width` words at the pointers row_R.

    What lies beyond the last word of a row, or is not `keep`, is 0.
    """
    if BITS == 8:
        codes_RUV = get_4(read_1(row_R, unit_U, width, keep_RU), 0, 1, BITS)
    elif BITS == 4:
        codes_RUV = get_8(read_1(row_R, unit_U, width, keep_RU), 0, 1, BITS)
    elif BITS == 2:
        codes_RUV = get_16(read_1(row_R, unit_U, width, keep_RU), 0, 1, BITS)
    elif BITS == 6:
        codes_RUV = get_16(read_3(row_R, unit_U, width, keep_RU), 0, 1, BITS)
    elif BITS == 3:
        codes_RUV = get_32(read_3(row_R, unit_U, width, keep_RU), BITS)
    elif BITS == 5:
        codes_RUV = get_32(read_5(row_R, unit_U, width, keep_RU), BITS)
    else:
        codes_RUV = get_32(read_7(row_R, unit_U, width, keep_RU), BITS)
    return codes_RUV.to(tl.int32)


@triton.jit
def read_scales(scale, factor, width, rows, groups, keep):
    """Scales, float32, of `rows` and `groups` (shapes that broadcast)."""
    if factor is None:
        numbers = tl.load(scale + rows * width + groups, mask=keep, other=0.0).to(tl.float32)
    else:
        code = read_values(scale + rows * width, groups, keep, 6) - 32
        each = tl.load(factor + rows, mask=keep, other=0.0).to(tl.float32)
        numbers = code.to(tl.float32) * each
    return numbers


@triton.jit
def find_levels(codes_RUV, levels):
    """What codes stand for; without a table themselves."""
    if levels is not None:
        codes_RUV = tl.load(levels + codes_RUV).to(tl.int32)
    return codes_RUV


@triton.jit
def read_zeros(zero, levels, width, rows, groups, keep, BITS: tl.constexpr):
    """Zero points as unsigned codes; the middle of the codes on a symmetric grid, 0 of levels."""
    if levels is not None:
        values = tl.where(keep, 0, 0)
    elif zero is None:
        values = tl.where(keep, 1 << (BITS - 1), 0)
    else:
        values = read_values(zero + rows * width, groups, keep, BITS)
    return values


@triton.jit(do_not_specialize=["code_width"])
def multiply_one(
    x,
    codes,
    scale,
    factor,
    zero,
    levels,
    bias,
    y,
    out,
    inputs,
    group,
    units,
    code_width,
    scale_width,
    zero_width,
    BITS: tl.constexpr,
    V: tl.constexpr,
    REGULAR: tl.constexpr,
    BN: tl.constexpr,
    BU: tl.constexpr,
):
    """One token: y (out,) of BN rows (program 0), BU units of V codes at a time."""
    row_N = tl.program_id(0) * BN + tl.arange(0, BN)
    keep_N, long_N = row_N < out, row_N.to(tl.int64)
    total_NU = tl.zeros((BN, BU), tl.float32)
    for first in range(0, units, BU):
        unit_U = first + tl.arange(0, BU)
        keep_NU = keep_N[:, None] & (unit_U < units)[None, :]
        index_UV = unit_U[:, None] * V + tl.arange(0, V)[None, :]
        x_UV = tl.load(x + index_UV, mask=index_UV < inputs, other=0.0).to(tl.float32)
        q_NUV = expand(codes + long_N * code_width, unit_U, code_width, keep_NU, BITS)
        q_NUV = find_levels(q_NUV, levels)
        if REGULAR:
            at_N1, group_1U = long_N[:, None], (unit_U * V // group)[None, :]
            zero_NU = read_zeros(zero, levels, zero_width, at_N1, group_1U, keep_NU, BITS)
            steps_NUV = (q_NUV - zero_NU[:, :, None]).to(tl.float32)
            sum_NU = tl.sum(steps_NUV * x_UV[None, :, :], 2)
            total_NU += sum_NU * read_scales(scale, factor, scale_width, at_N1, group_1U, keep_NU)
        else:
            at_N11, group_1UV = long_N[:, None, None], (index_UV // group)[None, :, :]
            keep_NUV = keep_N[:, None, None] & (index_UV < inputs)[None, :, :]
            zero_NUV = read_zeros(zero, levels, zero_width, at_N11, group_1UV, keep_NUV, BITS)
            scale_NUV = read_scales(scale, factor, scale_width, at_N11, group_1UV, keep_NUV)
            steps_NUV = (q_NUV - zero_NUV).to(tl.float32)
            total_NU += tl.sum(steps_NUV * scale_NUV * x_UV[None, :, :], 2)
    y_N = tl.sum(total_NU, 1)
    if bias is not None:
        y_N += tl.load(bias + row_N, mask=keep_N, other=0.0).to(tl.float32)
    tl.store(y + row_N, y_N.to(y.dtype.element_ty), mask=keep_N)


@triton.jit(do_not_specialize=["tokens", "span"])
def multiply_many(
    x,
    codes,
    scale,
    factor,
    zero,
    levels,
    bias,
    y,
    out,
    inputs,
    group,
    units,
    code_width,
    scale_width,
    zero_width,
    tokens,
    span,
    BITS: tl.constexpr,
    V: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A tile of tokens (program 0) and rows (program 1) over `span` chunks of inputs (program 2).

    y is (tokens, out), or with `SPLIT` float32 (parts, tokens, out).
    """
    token_M = tl.program_id(0) * BM + tl.arange(0, BM)
    row_N = tl.program_id(1) * BN + tl.arange(0, BN)
    part = tl.program_id(2)
    keep_M, long_M = token_M < tokens, token_M.to(tl.int64)
    keep_N, long_N = row_N < out, row_N.to(tl.int64)
    total_MN = tl.zeros((BM, BN), tl.float32)
    for chunk in range(part * span, tl.minimum(part * span + span, tl.cdiv(inputs, BK))):
        index_K = chunk * BK + tl.arange(0, BK)
        keep_MK = keep_M[:, None] & (index_K < inputs)[None, :]
        x_MK = tl.load(x + long_M[:, None] * inputs + index_K[None, :], mask=keep_MK, other=0.0)
        unit_U = chunk * (BK // V) + tl.arange(0, BK // V)
        keep_NU = keep_N[:, None] & (unit_U < units)[None, :]
        q_NUV = expand(codes + long_N * code_width, unit_U, code_width, keep_NU, BITS)
        q_NUV = find_levels(q_NUV, levels)
        g = chunk * BK // group
        zero_N = read_zeros(zero, levels, zero_width, long_N, g, keep_N, BITS)
        # of at most 255 in size: exact in every type of x
        steps_NUV = (q_NUV - zero_N[:, None, None]).to(tl.float32).to(x_MK.dtype)
        steps_KN = tl.trans(tl.reshape(steps_NUV, (BN, BK)))
        sum_MN = tl.dot(x_MK, steps_KN, input_precision="ieee", out_dtype=tl.float32)
        total_MN += sum_MN * read_scales(scale, factor, scale_width, long_N, g, keep_N)[None, :]
    keep_MN = keep_M[:, None] & keep_N[None, :]
    if SPLIT:
        place_M = part.to(tl.int64) * tokens + long_M
        tl.store(y + place_M[:, None] * out + row_N[None, :], total_MN, mask=keep_MN)
    else:
        if bias is not None:
            total_MN += tl.load(bias + row_N, mask=keep_N, other=0.0).to(tl.float32)[None, :]
        place_MN = y + long_M[:, None] * out + row_N[None, :]
        tl.store(place_MN, total_MN.to(y.dtype.element_ty), mask=keep_MN)


@triton.jit(do_not_specialize=["count", "parts"])
def add_parts(sums, bias, y, count, out, parts, BLOCK: tl.constexpr):
    """y = the sum of `parts` arrays of `count` float32 numbers, (tokens, out), and the bias."""
    index_B = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep_B = index_B < count
    total_B = tl.zeros((BLOCK,), tl.float32)
    place_B = sums + index_B
    for _ in range(parts):
        total_B += tl.load(place_B, mask=keep_B, other=0.0)
        place_B += count
    if bias is not None:
        total_B += tl.load(bias + index_B % out, mask=keep_B, other=0.0).to(tl.float32)
    tl.store(y + index_B, total_B.to(y.dtype.element_ty), mask=keep_B)


@triton.jit(do_not_specialize=["count", "start"])
def write_rows(
    ids,
    codes,
    scale,
    factor,
    zero,
    levels,
    y,
    out,
    inputs,
    group,
    units,
    code_width,
    scale_width,
    zero_width,
    count,
    start,
    BITS: tl.constexpr,
    V: tl.constexpr,
    REGULAR: tl.constexpr,
    BR: tl.constexpr,
    BU: tl.constexpr,
):
    """Weights y (count, inputs) of the rows `ids`, or without ids of the rows from `start` on.

    BR rows (program 0) and BU units (program 1). A row that does not exist becomes NaN: an error
    could be told only by waiting for the GPU.
    """
    place_R = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    stored_R = place_R < count
    row_R = start + place_R
    if ids is not None:
        row_R = tl.load(ids + place_R, mask=stored_R, other=0).to(tl.int64)
    keep_R = stored_R & (row_R >= 0) & (row_R < out)
    unit_U = tl.program_id(1) * BU + tl.arange(0, BU)
    keep_RU = keep_R[:, None] & (unit_U < units)[None, :]
    index_UV = unit_U[:, None] * V + tl.arange(0, V)[None, :]
    q_RUV = expand(codes + row_R * code_width, unit_U, code_width, keep_RU, BITS)
    q_RUV = find_levels(q_RUV, levels)
    if REGULAR:
        at_R1, group_1U = row_R[:, None], (unit_U * V // group)[None, :]
        zero_RUV = read_zeros(zero, levels, zero_width, at_R1, group_1U, keep_RU, BITS)[:, :, None]
        scale_RU = read_scales(scale, factor, scale_width, at_R1, group_1U, keep_RU)
        scale_RUV = scale_RU[:, :, None]
    else:
        at_R11, group_1UV = row_R[:, None, None], (index_UV // group)[None, :, :]
        keep_RUV = keep_R[:, None, None] & (index_UV < inputs)[None, :, :]
        zero_RUV = read_zeros(zero, levels, zero_width, at_R11, group_1UV, keep_RUV, BITS)
        scale_RUV = read_scales(scale, factor, scale_width, at_R11, group_1UV, keep_RUV)
    exists_R11 = keep_R[:, None, None]
    W_RUV = (q_RUV - zero_RUV).to(tl.float32) * tl.where(exists_R11, scale_RUV, float("nan"))
    kept_RUV = stored_R[:, None, None] & (index_UV < inputs)[None, :, :]
    place_RUV = y + place_R[:, None, None] * inputs + index_UV[None, :, :]
    tl.store(place_RUV, W_RUV.to(y.dtype.element_ty), mask=kept_RUV)
