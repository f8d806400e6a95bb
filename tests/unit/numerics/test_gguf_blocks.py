"""Our blocks against the gguf package's own decoder, and against a loop over ggml's definition."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from cptq.layouts.gguf import BLOCK_BYTES, find_type
from cptq.numerics.gguf_blocks import fits_float16, pack_blocks
from cptq.numerics.grid import count_scale_bits, get_code_range, round_to_precision
from cptq.numerics.levels import Spacing, to_levels
from cptq.types import Candidate
from tests.reference.gguf_blocks import unpack_block


def drawn(
    bits: int, out: int, inputs: int, group: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(bits * 1000 + out)
    low, high = get_code_range(bits)
    codes = torch.randint(low, high + 1, (out, inputs), generator=generator).to(torch.int8)
    codes[0, 0], codes[-1, -1] = low, high
    scale = torch.randn(out, inputs // group, generator=generator).to(torch.float16)
    return codes, scale.to(dtype)


def drawn_asymmetric(
    bits: int, out: int, inputs: int, group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `drawn`, with zero points and scales to go with them."""
    codes, scale = drawn(bits, out, inputs, group)
    low, high = get_code_range(bits)
    generator = torch.Generator().manual_seed(bits)
    zero = torch.randint(low, high + 1, scale.shape, generator=generator).to(torch.int8)
    zero[0, 0] = high
    return codes, round_to_precision(scale, count_scale_bits(zero, bits)), zero


def weights(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None
) -> np.ndarray:
    group = codes.shape[1] // scale.shape[1]
    steps = codes.double()
    if zero is not None:
        steps = steps - zero.double().repeat_interleave(group, dim=1)
    return (steps * scale.double().repeat_interleave(group, dim=1)).numpy()


def kind_of(bits: int, symmetric: bool = True) -> str:
    kind = find_type(Candidate(bits=bits, group_size=32, symmetric=symmetric))
    assert kind is not None
    return kind


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("out", "inputs", "group"), [(1, 32, 32), (7, 96, 32), (5, 192, 64)])
def test_the_library_reads_back_exactly_what_was_packed(
    bits: int, out: int, inputs: int, group: int
) -> None:
    codes, scale = drawn(bits, out, inputs, group)
    kind = kind_of(bits)
    packed = pack_blocks(codes, scale, kind).numpy()
    assert packed.shape == (out, inputs // 32 * BLOCK_BYTES[kind])
    read = gguf.dequantize(packed, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(read.astype(np.float64), weights(codes, scale))


@pytest.mark.parametrize(("out", "inputs", "group"), [(1, 32, 32), (7, 96, 32), (5, 192, 64)])
def test_the_library_reads_back_uneven_levels_too(out: int, inputs: int, group: int) -> None:
    codes, scale = drawn(4, out, inputs, group)
    kind = find_type(Candidate(bits=4, group_size=32, levels="iq4nl"))
    assert kind == "IQ4_NL"
    levels = to_levels(codes, Spacing(4, "iq4nl"))
    read = gguf.dequantize(
        pack_blocks(levels, scale, kind).numpy(), gguf.GGMLQuantizationType[kind]
    )
    assert np.array_equal(read.astype(np.float64), weights(levels, scale))
    assert find_type(Candidate(bits=5, group_size=32, levels="iq4nl")) is None
    assert find_type(Candidate(bits=4, group_size=32, levels="nl")) is None
    with pytest.raises(ValueError, match="no iq4nl level"):
        pack_blocks(codes, scale, kind)


@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize(("out", "inputs", "group"), [(1, 32, 32), (7, 96, 32), (5, 192, 64)])
def test_the_library_reads_back_asymmetric_codes_too(
    bits: int, out: int, inputs: int, group: int
) -> None:
    codes, scale, zero = drawn_asymmetric(bits, out, inputs, group)
    kind = kind_of(bits, symmetric=False)
    packed = pack_blocks(codes, scale, kind, zero).numpy()
    assert packed.shape == (out, inputs // 32 * BLOCK_BYTES[kind])
    read = gguf.dequantize(packed, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(read.astype(np.float64), weights(codes, scale, zero))


@pytest.mark.parametrize(
    ("bits", "symmetric"), [(4, True), (5, True), (8, True), (4, False), (5, False)]
)
def test_a_block_is_what_the_definition_says(bits: int, symmetric: bool) -> None:
    codes, scale, zero = drawn_asymmetric(min(bits, 5), 3, 64, 32)
    kind = kind_of(bits, symmetric)
    size, given = BLOCK_BYTES[kind], None if symmetric else zero
    for row, packed in enumerate(pack_blocks(codes, scale, kind, given).numpy()):
        for block in range(2):
            read = unpack_block(bytes(packed[block * size : (block + 1) * size]), kind)
            wanted = weights(codes, scale, given)[row, block * 32 : (block + 1) * 32]
            assert read == wanted.tolist()


def test_the_library_knows_the_same_sizes() -> None:
    for kind, size in BLOCK_BYTES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (32, size)


def test_a_minimum_that_float16_rounds_is_refused() -> None:
    codes, scale = torch.zeros(1, 32, dtype=torch.int8), torch.full((1, 1), 1 + 2.0**-10)
    zero = torch.full((1, 1), -5, dtype=torch.int8)  # 3 * (1 + 2^-10) has 12 significant bits
    with pytest.raises(ValueError, match="float16"):
        pack_blocks(codes, scale, "Q4_1", zero)
    with pytest.raises(ValueError, match="Q4_0"):
        pack_blocks(codes, scale, "Q4_0", zero)
    with pytest.raises(ValueError, match="Q5_1"):
        pack_blocks(codes, scale, "Q5_1")


@pytest.mark.parametrize(
    ("codes", "scale", "kind"),
    [
        (torch.zeros(2, 48, dtype=torch.int8), torch.ones(2, 1), "Q4_0"),
        (torch.zeros(2, 96, dtype=torch.int8), torch.ones(2, 2), "Q4_0"),
        (torch.full((1, 32), 8, dtype=torch.int8), torch.ones(1, 1), "Q4_0"),
        (torch.full((1, 32), -17, dtype=torch.int8), torch.ones(1, 1), "Q5_0"),
        (torch.zeros(1, 32, dtype=torch.int8), torch.full((1, 1), 1 + 2.0**-12), "Q8_0"),
        (torch.zeros(1, 32, dtype=torch.int8), torch.full((1, 1), 1e6), "Q8_0"),
    ],
)
def test_what_a_block_cannot_hold_is_refused(
    codes: torch.Tensor, scale: torch.Tensor, kind: str
) -> None:
    with pytest.raises(ValueError, match=r"\b32\b|\[-\d+, \d+\]|float16"):
        pack_blocks(codes, scale, kind)


def test_bfloat16_scales_are_exact_down_to_their_bound() -> None:
    exponents = torch.arange(-17.0, 16.0)
    scale = (1 + 127 / 128) * torch.exp2(exponents)
    assert fits_float16(scale.to(torch.bfloat16)[None])
    assert not fits_float16(torch.tensor([[2.0**-18 * (1 + 1 / 128)]]).to(torch.bfloat16))
