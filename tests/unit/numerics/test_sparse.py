"""Sparse codes against loops: every weight where its mask says, and nowhere else."""

from __future__ import annotations

import itertools

import pytest
import torch

from cptq.numerics.packing import pack_rows, pack_values, unpack_values
from cptq.numerics.sparse import (
    gather_codes,
    join_n_of_m,
    list_patterns,
    scatter_codes,
    split_n_of_m,
    unpack_range,
)
from tests.reference.asymmetric import bits_of

SHAPES = [(1, 1), (3, 7), (5, 33), (4, 64), (7, 131)]


def random_codes(out: int, inputs: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(inputs + bits)
    half = 1 << (bits - 1)
    return torch.randint(-half, half, (out, inputs), generator=generator).to(torch.int8)


def random_mask(out: int, inputs: int, share: float = 0.4) -> torch.Tensor:
    return torch.rand(out, inputs, generator=torch.Generator().manual_seed(inputs)) < share


@pytest.mark.parametrize(("out", "inputs"), SHAPES)
def test_stored_codes_come_back_to_their_places(out: int, inputs: int) -> None:
    codes_OI, mask_OI = random_codes(out, inputs, 8), random_mask(out, inputs)
    stored_N = gather_codes(codes_OI, mask_OI)
    places = [(i, j) for i in range(out) for j in range(inputs) if mask_OI[i, j]]
    assert stored_N.tolist() == [int(codes_OI[i, j]) for i, j in places]
    assert torch.equal(scatter_codes(stored_N, mask_OI), codes_OI * mask_OI)


def test_codes_and_places_must_be_as_many() -> None:
    mask_OI = torch.tensor([[True, False], [True, True]])
    with pytest.raises(ValueError, match=r"\b2\b.*\b3\b"):
        scatter_codes(torch.zeros(2, dtype=torch.int8), mask_OI)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("inputs", [1, 31, 32, 33, 77])
def test_unsigned_values_are_a_stream_of_bits(bits: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(inputs)
    values = torch.randint(0, 1 << bits, (2, inputs), generator=generator, dtype=torch.uint8)
    packed = pack_values(values, bits)
    for row, words in zip(values.tolist(), packed.tolist(), strict=True):
        assert [bits_of(words, i * bits, bits) for i in range(inputs)] == row
    assert torch.equal(unpack_values(packed, bits, inputs), values)


def test_values_that_need_more_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="3 bits"):
        pack_values(torch.tensor([[8]], dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="9 bits"):
        pack_values(torch.zeros(1, 1, dtype=torch.uint8), 9)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_range_of_a_stream_is_read_alone(bits: int) -> None:
    codes = random_codes(1, 333, bits)
    stream = pack_rows(codes, bits)[0]
    unsigned = codes[0].int() + (1 << (bits - 1))
    for start, stop in [(0, 333), (0, 1), (31, 33), (32, 64), (100, 100), (257, 333)]:
        assert unpack_range(stream, bits, start, stop).tolist() == unsigned[start:stop].tolist()


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (4, 8), (1, 2), (3, 5), (7, 8)])
@pytest.mark.parametrize(("out", "blocks"), [(1, 1), (3, 2), (5, 9), (2, 33)])
def test_n_of_m_by_pattern(out: int, blocks: int, kept: int, of: int) -> None:
    inputs, patterns = blocks * of, tuple(itertools.combinations(range(of), kept))
    codes_OI = random_codes(out, inputs, 4)
    generator = torch.Generator().manual_seed(out)
    chosen = torch.randint(0, len(patterns), (out, blocks), generator=generator)
    mask_OI = torch.zeros(out, inputs, dtype=torch.bool)
    expected = [[int(chosen[i, b]) for b in range(blocks)] for i in range(out)]
    for i, row in enumerate(expected):
        for block, pattern in enumerate(row):
            for place in patterns[pattern]:
                mask_OI[i, of * block + place] = True
    pattern_OB, kept_OK = split_n_of_m(codes_OI, mask_OI, kept, of)
    assert pattern_OB.tolist() == expected
    stored = [[int(codes_OI[i, j]) for j in range(inputs) if mask_OI[i, j]] for i in range(out)]
    assert kept_OK.tolist() == stored
    back_OI, back_mask_OI = join_n_of_m(pattern_OB, kept_OK, kept, of)
    assert torch.equal(back_mask_OI, mask_OI)
    assert torch.equal(back_OI, codes_OI * mask_OI)


def test_patterns_are_numbered_as_in_the_format() -> None:
    assert list_patterns(2, 4) == ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


def test_what_is_no_n_of_m_is_refused() -> None:
    codes = torch.zeros(1, 4, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"\b2\b"):
        split_n_of_m(codes, torch.tensor([[True, True, True, False]]), 2, 4)
    with pytest.raises(ValueError, match=r"\b4\b"):
        split_n_of_m(codes[:, :3], torch.ones(1, 3, dtype=torch.bool), 2, 4)
    with pytest.raises(ValueError, match=r"\b5\b"):
        join_n_of_m(
            torch.tensor([[6]], dtype=torch.uint8), torch.zeros(1, 2, dtype=torch.int8), 2, 4
        )
