"""Numbers as people read them. Bytes are decimal (1 MB = 1,000,000 bytes), as disks count them."""

from __future__ import annotations

from math import isfinite

_STEPS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def size(nbytes: int) -> str:
    """`84.2 MB`."""
    for step, unit in _STEPS:
        if nbytes >= step:
            return f"{nbytes / step:.4g} {unit}"
    return f"{nbytes} B"


def size_exact(nbytes: int) -> str:
    """`84.2 MB (84,213,456 bytes)`."""
    return f"{size(nbytes)} ({nbytes:,} bytes)" if nbytes >= 1000 else f"{nbytes} bytes"


def count(number: int) -> str:
    """`134.5 M` for a number of parameters."""
    for step, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= step:
            return f"{number / step:.4g} {unit}"
    return str(number)


def number(value: float | None, digits: int = 4) -> str:
    """A measured number with `digits` significant digits; a dash for None."""
    if value is None:
        return "-"
    if not isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.{digits - 1}e}"
    return f"{value:.{digits}g}"


def signed(value: float | None, digits: int = 4) -> str:
    """As `number`, with its sign."""
    if value is None:
        return "-"
    return ("+" if value > 0 else "") + number(value, digits)


def seconds(value: float) -> str:
    """`0.42 s`, `12 s`, `3 min 05 s`, `2 h 04 min`."""
    if value < 10:
        return f"{value:.2g} s" if value >= 0.01 else "0 s"
    whole = round(value)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def percent(share: float) -> str:
    """`31.3%`."""
    return f"{100 * share:.3g}%"


def plural(amount: int, noun: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{amount:,} {noun}" + ("" if amount == 1 else "s")
