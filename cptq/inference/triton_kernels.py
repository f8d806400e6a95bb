"""Kernels of the backend `triton`: products on a GPU, straight from the bits of the file.

The weight of a row n and an input k in group g is (q_nk - z_ng) s_ng (docs/format-packed.md), so

    y_mn = sum_g s_ng sum_{k in g} x_mk (q_nk - z_ng)  [+ b_n].

**Method.** Inputs are taken in chunks of BK that do not cross a group; what a chunk has beyond the
end of its group is masked. The inner sum then has integer weights of at most 255 in size, which
float16 and bfloat16 hold exactly, and one scale per row multiplies it afterwards in float32: no
weight is ever rounded, and the tensor cores work in the type of x. The result is rounded once.

**Bits.** Where 32 is a multiple of the width and chunks begin on whole words, each word is loaded
once and shifted apart in registers. Other widths load for each value the word it begins in and,
where it straddles two, the next: each word is loaded by about 32 / bits lanes, from the L1 cache.

**Shape of the work.** Products of few tokens read all weights for little arithmetic: the time is
that of the memory if enough loads are under way. So the sum over inputs is split among programs
(`part`) until the processors are full, each writes its float32 sums, and `add_parts` adds them in a
fixed order: unlike atomic additions, the same result each time. One token needs no tensor core
(`multiply_one`); more are one side of a 16-row tile (`multiply_many`), whose cost does not depend
on how many of the 16 are used.

**Sources.** Splitting the inner dimension of quantized products of few rows: Hoque et al., arXiv
2402.00025 (with atomics). Dequantizing in registers before 16-row tensor-core tiles, for up to 16
tokens at the price of one: Marlin, Frantar et al., arXiv 2408.11743, which needs weights reordered
in advance; here they lie as in the file.

**Cost.** Per weight a shift, a mask, a subtraction, a conversion and a multiply-add. Memory: the
result, and float32 sums of parts x tokens x out.

**Limits.** Checked in Triton's interpreter; not yet measured on a GPU. Block sizes are guesses, not
tuned. Groups smaller than 16, or that 16 does not divide, waste the masked part of their chunks.
float32 x are multiplied in full float32, without tensor cores.
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
def read_codes(
    words_R, width, first, limit, keep_R, BITS: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr
):
    """Unsigned codes (R, K) of inputs from `first`; those from `limit` on have no meaning.

    `words_R` are where rows begin, `width` their words. `WHOLE`: `first` begins a word and no code
    straddles two.
    """
    if WHOLE:
        PER: tl.constexpr = 32 // BITS
        word_W = first // PER + tl.arange(0, K // PER)
        keep_RW = keep_R[:, None] & (word_W < width)[None, :]
        packed_RW = tl.load(words_R[:, None] + word_W[None, :], mask=keep_RW, other=0)
        shift_P = (tl.arange(0, PER) * BITS).to(tl.uint32)
        values_RWP = packed_RW.to(tl.uint32, bitcast=True)[:, :, None] >> shift_P[None, None, :]
        values_RWP &= (1 << BITS) - 1
        values_RK = tl.reshape(values_RWP, (words_R.shape[0], K)).to(tl.int32)
    else:
        index_K = first + tl.arange(0, K)
        keep_RK = keep_R[:, None] & (index_K < limit)[None, :]
        values_RK = read_values(words_R[:, None], index_K[None, :], keep_RK, BITS)
    return values_RK


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
def read_zeros(zero, width, rows, groups, keep, BITS: tl.constexpr):
    """Zero points as unsigned codes; the middle of the codes on a symmetric grid."""
    if zero is None:
        values = tl.where(keep, 1 << (BITS - 1), 0)
    else:
        values = read_values(zero + rows * width, groups, keep, BITS)
    return values


@triton.jit
def find_chunk(chunk, group, per_group, inputs, BK: tl.constexpr, EVEN: tl.constexpr):
    """Group of a chunk, its first input, and the end of what belongs to it."""
    g = chunk // per_group
    first = g * group + (chunk - g * per_group) * BK
    # where chunks fill groups, several chunks are consecutive inputs as well
    limit = inputs if EVEN else (g + 1) * group
    return g, first, limit


@triton.jit(do_not_specialize=["span"])
def multiply_one(
    x,
    codes,
    scale,
    factor,
    zero,
    bias,
    y,
    out,
    inputs,
    group,
    per_group,
    chunks,
    code_width,
    scale_width,
    zero_width,
    span,
    BITS: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
):
    """One token: rows (program 0) times `span` chunks of inputs (program 1), C chunks at once.

    y is (out,), or with `SPLIT` float32 (parts, out). More than one chunk at once needs `EVEN`.
    """
    row_N = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    keep_N, long_N = row_N < out, row_N.to(tl.int64)
    total_NC = tl.zeros((BN, C), tl.float32)
    for chunk in range(part * span, tl.minimum(part * span + span, chunks), C):
        _, first, limit = find_chunk(chunk, group, per_group, inputs, BK, EVEN)
        index_K = first + tl.arange(0, C * BK)
        x_K = tl.load(x + index_K, mask=index_K < limit, other=0.0).to(tl.float32)
        chunk_C = chunk + tl.arange(0, C)
        keep_NC = keep_N[:, None] & (chunk_C < chunks)[None, :]
        at_N1, group_1C = long_N[:, None], (chunk_C // per_group)[None, :]
        q_NK = read_codes(
            codes + long_N * code_width, code_width, first, limit, keep_N, BITS, C * BK, WHOLE
        )
        zero_NC = read_zeros(zero, zero_width, at_N1, group_1C, keep_NC, BITS)
        steps_NCK = tl.reshape(q_NK, (BN, C, BK)) - zero_NC[:, :, None]
        sum_NC = tl.sum(steps_NCK.to(tl.float32) * tl.reshape(x_K, (1, C, BK)), 2)
        total_NC += sum_NC * read_scales(scale, factor, scale_width, at_N1, group_1C, keep_NC)
    y_N = tl.sum(total_NC, 1)
    if SPLIT:
        tl.store(y + part.to(tl.int64) * out + row_N, y_N, mask=keep_N)
    else:
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
    bias,
    y,
    out,
    inputs,
    group,
    per_group,
    chunks,
    code_width,
    scale_width,
    zero_width,
    tokens,
    span,
    BITS: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
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
    for chunk in range(part * span, tl.minimum(part * span + span, chunks)):
        g, first, limit = find_chunk(chunk, group, per_group, inputs, BK, EVEN)
        index_K = first + tl.arange(0, BK)
        keep_MK = keep_M[:, None] & (index_K < limit)[None, :]
        x_MK = tl.load(x + long_M[:, None] * inputs + index_K[None, :], mask=keep_MK, other=0.0)
        q_NK = read_codes(
            codes + long_N * code_width, code_width, first, limit, keep_N, BITS, BK, WHOLE
        )
        steps_NK = q_NK - read_zeros(zero, zero_width, long_N, g, keep_N, BITS)[:, None]
        # of at most 255 in size: exact in every type of x
        steps_KN = tl.trans(steps_NK.to(tl.float32).to(x_MK.dtype))
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
    y,
    out,
    inputs,
    group,
    per_group,
    chunks,
    code_width,
    scale_width,
    zero_width,
    count,
    start,
    span,
    BITS: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """Weights y (count, inputs) of the rows `ids`, or without ids of the rows from `start` on.

    A row that does not exist becomes NaN: an error could be told only by waiting for the GPU.
    """
    place_R = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    part = tl.program_id(1)
    stored_R = place_R < count
    row_R = start + place_R
    if ids is not None:
        row_R = tl.load(ids + place_R, mask=stored_R, other=0).to(tl.int64)
    keep_R = stored_R & (row_R >= 0) & (row_R < out)
    for chunk in range(part * span, tl.minimum(part * span + span, chunks)):
        g, first, limit = find_chunk(chunk, group, per_group, inputs, BK, EVEN)
        index_K = first + tl.arange(0, BK)
        q_RK = read_codes(
            codes + row_R * code_width, code_width, first, limit, keep_R, BITS, BK, WHOLE
        )
        steps_RK = q_RK - read_zeros(zero, zero_width, row_R, g, keep_R, BITS)[:, None]
        scale_R = read_scales(scale, factor, scale_width, row_R, g, keep_R)
        W_RK = steps_RK.to(tl.float32) * tl.where(keep_R, scale_R, float("nan"))[:, None]
        keep_RK = stored_R[:, None] & (index_K < limit)[None, :]
        place_RK = y + place_R[:, None] * inputs + index_K[None, :]
        tl.store(place_RK, W_RK.to(y.dtype.element_ty), mask=keep_RK)
