"""Group sizes against a search over all divisors."""

from __future__ import annotations

import pytest

from cptq.layouts.groups import resolve_group

ASKED = (0, 1, 2, 3, 7, 16, 31, 32, 64, 100, 128, 200, 4096)


def by_exhaustion(features: int, asked: int) -> int:
    divisors = [size for size in range(1, features + 1) if features % size == 0]
    if asked == 0 or asked >= features:
        return features
    return max((d for d in divisors if asked / 2 <= d <= asked), default=features)


@pytest.mark.parametrize("asked", ASKED)
def test_the_largest_divisor_between_half_and_all_of_what_is_asked(asked: int) -> None:
    for features in [*range(1, 300), 576, 1536, 4096, 11008]:
        assert resolve_group(features, asked) == by_exhaustion(features, asked), features


@pytest.mark.parametrize(
    ("features", "asked", "got"),
    [
        (4096, 128, 128),
        (4096, 0, 4096),
        (48, 64, 48),
        (80, 64, 40),
        (80, 32, 20),
        (80, 16, 16),
        (11008, 128, 128),
        (127, 64, 127),
        (74, 64, 37),
        (62, 32, 31),
        (62, 33, 31),
        (62, 61, 31),
        (9, 5, 3),
        (5, 1, 1),
        (1, 64, 1),
    ],
)
def test_examples(features: int, asked: int, got: int) -> None:
    assert resolve_group(features, asked) == got
