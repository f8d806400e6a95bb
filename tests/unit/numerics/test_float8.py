"""Rounding to 8-bit floats, against a search over all numbers that a format has."""

from __future__ import annotations

import pytest
import torch

from cptq.numerics.float8 import FORMATS, measure_float8_error, round_to_float8


def all_numbers(name: str) -> torch.Tensor:
    """Every finite number of a format, float64."""
    found = torch.arange(256, dtype=torch.uint8).view(FORMATS[name]).double()
    return found[torch.isfinite(found)]


@pytest.mark.parametrize("name", FORMATS)
def test_rounds_to_the_nearest_number_of_the_format(name: str) -> None:
    numbers = all_numbers(name)
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(7, 31, generator=generator) * torch.logspace(-7, 5, 31)
    nearest = (X.double().unsqueeze(-1) - numbers).abs().min(-1).values
    rounded = round_to_float8(X, name)
    assert rounded.dtype is FORMATS[name]
    assert torch.equal((X.double() - rounded.double()).abs(), nearest)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_too_large_becomes_the_largest(name: str) -> None:
    most = float(all_numbers(name).max())
    X = torch.tensor([[1e9, -1e9, most]])
    assert round_to_float8(X, name).double().tolist() == [[most, -most, most]]


def test_the_error_chooses_by_the_size_of_the_weights() -> None:
    W = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    large = {name: measure_float8_error(W, name) for name in FORMATS}
    small = {name: measure_float8_error(W * 2**-9, name) for name in FORMATS}
    assert large["e4m3"] < large["e5m2"]
    assert small["e5m2"] < small["e4m3"]
    assert measure_float8_error(torch.zeros(2, 3), "e4m3") == 0
