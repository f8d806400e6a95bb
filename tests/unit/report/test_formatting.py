"""Numbers, sizes, times and names as text."""

from __future__ import annotations

import pytest

from cptq.report.formatting import (
    format_bytes,
    format_bytes_exact,
    format_count,
    format_number,
    format_p_value,
    format_percent,
    format_plural,
    format_seconds,
    format_signed,
    format_with_error,
    shorten_names,
)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (format_bytes(999), "999 B"),
        (format_bytes(84_213_456), "84.21 MB"),
        (format_bytes(2_500_000_000), "2.5 GB"),
        (format_bytes_exact(84_213_456), "84.21 MB (84,213,456 bytes)"),
        (format_count(134_515_008), "134.5 M"),
        (format_number(None), "-"),
        (format_number(float("inf")), "inf"),
        (format_number(27.0512), "27.05"),
        (format_number(12345.6), "12,346"),
        (format_number(0.000123456), "0.0001235"),
        (format_number(3.0), "3"),
        (format_number(4_431_000_123.0), "4,431,000,123"),
        (format_signed(0.5), "+0.5"),
        (format_signed(-0.5), "-0.5"),
        (format_seconds(0.0), "0 s"),
        (format_seconds(0.42), "0.42 s"),
        (format_seconds(119.6), "2 min 00 s"),
        (format_seconds(7440), "2 h 04 min"),
        (format_percent(0.41624), "41.6%"),
        (format_with_error(0.8601, 0.0123), "0.8601 ± 0.012"),
        (format_with_error(2.0, None), "2"),
        (format_p_value(0.0004), "<0.001"),
        (format_p_value(0.0412), "0.041"),
        (format_plural(1, "layer"), "1 layer"),
        (format_plural(2100, "layer"), "2,100 layers"),
    ],
)
def test_numbers_are_formatted(shown: str, expected: str) -> None:
    assert shown == expected


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (("/a/b/dense", "out/four/"), ["dense", "four"]),
        (("a/eval.json", "b/eval.json"), ["a/eval", "b/eval"]),
        (("a/m", "a/m.json"), ["m", "m.json"]),
        (("org/m", "./org/m"), ["org/m", "./org/m"]),
    ],
)
def test_names_are_as_short_as_possible(sources: tuple[str, ...], names: list[str]) -> None:
    assert shorten_names(sources) == names
