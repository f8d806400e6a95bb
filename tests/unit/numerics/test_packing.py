from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import (
    pack_to_int32,
    unpack_from_int32,
)

from cptq.numerics import packing
from cptq.numerics.packing import count_words, pack_rows, unpack_rows
from tests.reference.packing import pack_row

BITS = range(2, 9)
INPUTS = (1, 2, 7, 31, 32, 33, 48, 63, 64, 65, 96, 131)


def random_codes(out: int, inputs: int, bits: int) -> torch.Tensor:
    half = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(97 * inputs + bits)
    return torch.randint(-half, half, (out, inputs), generator=generator).to(torch.int8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_equals_a_bitstream_written_bit_by_bit(bits: int, inputs: int) -> None:
    codes = random_codes(3, inputs, bits)
    expected = [pack_row(row, bits) for row in codes.tolist()]
    assert pack_rows(codes, bits).tolist() == expected


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_equals_compressed_tensors(bits: int, inputs: int) -> None:
    codes = random_codes(5, inputs, bits)
    packed = pack_rows(codes, bits)
    assert packed.dtype is torch.int32
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_unpack_is_the_inverse(bits: int, inputs: int) -> None:
    codes = random_codes(4, inputs, bits)
    packed = pack_rows(codes, bits)
    assert packed.shape == (4, count_words(inputs, bits))
    assert torch.equal(unpack_rows(packed, bits, inputs), codes)


@pytest.mark.parametrize("bits", BITS)
def test_the_extremes_of_the_range_survive(bits: int) -> None:
    half = 2 ** (bits - 1)
    codes = torch.tensor([[-half, half - 1] * 17, [half - 1] * 34, [-half] * 34]).to(torch.int8)
    assert torch.equal(unpack_rows(pack_rows(codes, bits), bits, 34), codes)


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(23, 45, 5)
    whole = pack_rows(codes, 5)
    monkeypatch.setattr(packing, "CHUNK", 100)
    assert torch.equal(pack_rows(codes, 5), whole)
    assert torch.equal(unpack_rows(whole, 5, 45), codes)


@pytest.mark.parametrize("code", [-5, 4])
def test_a_code_outside_the_range_is_refused(code: int) -> None:
    with pytest.raises(ValueError, match=r"\[-4, 3\]"):
        pack_rows(torch.tensor([[0, code]], dtype=torch.int8), 3)


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"\b{bits} bits"):
        pack_rows(torch.zeros(1, 1, dtype=torch.int8), bits)


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="int8"):
        pack_rows(torch.zeros(2, 2), 4)
