"""Our super-blocks against the gguf package's decoder, and against bit fields set one by one."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from cptq.layouts.gguf import SUPER_BLOCK, SUPER_BYTES, SUPER_MOST, SUPER_TYPES
from cptq.numerics.gguf_super_blocks import pack_super_blocks
from cptq.numerics.grid import dequantize, get_code_range
from cptq.numerics.super_scales import SuperScales, split_supers
from tests.reference.gguf_blocks import pack_super_block

TYPES = list(SUPER_TYPES.items())


def drawn(bits: int, out: int, inputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every code, scales of either sign, a group without a scale, the smallest and the largest."""
    generator = torch.Generator().manual_seed(10 * bits + out)
    low, high = get_code_range(bits)
    codes_OI = torch.randint(low, high + 1, (out, inputs), generator=generator).to(torch.int8)
    codes_OI[0, :16] = 0
    scale_OG = 0.02 * torch.randn(out, inputs // 16, generator=generator)
    scale_OG[0, 0] = 0.0
    scale_OG[1:2] *= 1e-7
    scale_OG[2:3] *= 1e7
    return codes_OI, SuperScales(SUPER_MOST[bits], dtype).round(scale_OG)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("out", "inputs"), [(1, 256), (7, 512), (5, 1536)])
@pytest.mark.parametrize(("bits", "kind"), TYPES)
def test_the_library_reads_back_exactly_what_was_packed(
    bits: int, kind: str, out: int, inputs: int, dtype: torch.dtype
) -> None:
    codes_OI, scale_OG = drawn(bits, out, inputs, dtype)
    packed = pack_super_blocks(codes_OI, scale_OG, kind).numpy()
    assert packed.shape == (out, inputs // 256 * SUPER_BYTES[kind])
    read = gguf.dequantize(packed, gguf.GGMLQuantizationType[kind])
    wanted = dequantize(codes_OI, scale_OG, dtype=torch.float32).numpy()
    assert read.dtype == wanted.dtype == np.float32
    assert np.array_equal(read, wanted)


@pytest.mark.parametrize(("bits", "kind"), TYPES)
def test_the_bytes_are_those_of_the_definition(bits: int, kind: str) -> None:
    codes_OI, scale_OG = drawn(bits, 3, 512, torch.float16)
    c_OG, d_OB = split_supers(scale_OG, SUPER_MOST[bits])
    for row, packed in enumerate(pack_super_blocks(codes_OI, scale_OG, kind)):
        wanted = b"".join(
            pack_super_block(
                codes_OI[row, 256 * block :][:256].tolist(),
                c_OG[row, 16 * block :][:16].tolist(),
                float(d_OB[row, block]),
                kind,
            )
            for block in range(2)
        )
        assert packed.numpy().tobytes() == wanted


def test_the_library_knows_the_same_sizes() -> None:
    for kind, size in SUPER_BYTES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (SUPER_BLOCK, size)


@pytest.mark.parametrize(
    ("codes", "scale", "words"),
    [
        (torch.zeros(2, 288), torch.ones(2, 18), "288 inputs"),
        (torch.zeros(2, 256), torch.ones(2, 8), "8 groups"),
        (torch.full((1, 256), 4.0), torch.ones(1, 16), r"\[-4, 3\]"),
        (torch.zeros(1, 256), torch.rand(1, 16), "no codes up to 31"),
    ],
)
def test_what_a_super_block_cannot_hold_is_refused(
    codes: Tensor, scale: Tensor, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        pack_super_blocks(codes.to(torch.int8), scale, "Q3_K")
