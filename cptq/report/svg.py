"""A few words of SVG: escaped elements, axes that choose their ticks, and their scales.

Colours are classes that the page's style sheet defines, so that one drawing serves light and dark.
Nothing is fetched and nothing runs: a drawing is text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, isfinite, log10

#: a log axis is chosen when the largest positive value is this many times the smallest
LOG_RATIO = 30.0
#: ... and when no more than this share of the values is zero or below
LOG_NON_POSITIVE = 0.1


def text(value: object) -> str:
    """`value` escaped for an element's content, control characters replaced.

    Source: XML 1.0 section 2.2 forbids most control characters even when escaped.
    """
    shown = "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in str(value)
    )
    return escape(shown, quote=True)


def tag(name: str, *children: str, **attributes: object) -> str:
    """One element. `class_` stands for `class`, other underscores for hyphens.

    Children are markup that is already escaped; attribute values are escaped here, numbers are
    rounded to a hundredth of a pixel, and None leaves the attribute out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{written}>{''.join(children)}</{name}>"


def _attribute(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else text(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Values to vertical pixels: `low` lies at `bottom`, `high` at `top`."""

    low: float
    high: float
    top: float
    bottom: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value; what a log axis cannot hold lies at the bottom."""
        if self.log:
            share = (
                0.0 if value <= 0 else self._share(log10(value), log10(self.low), log10(self.high))
            )
        else:
            share = self._share(value, self.low, self.high)
        return self.bottom - min(max(share, 0.0), 1.0) * (self.bottom - self.top)

    @staticmethod
    def _share(value: float, low: float, high: float) -> float:
        return (value - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[float]:
        """Values worth a line, lowest first."""
        found = _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)
        slack = 1e-9 * (self.high - self.low)
        return [value for value in found if self.low - slack <= value <= self.high + slack]


def choose_scale(values: Sequence[float], *, top: float, bottom: float) -> Scale:
    """A scale that holds all finite values: from zero, or logarithmic where the range needs it."""
    finite = [value for value in values if isfinite(value)]
    positive = [value for value in finite if value > 0]
    if positive and _needs_log(positive, len(finite)):
        low, high = _decades(min(positive), max(positive))
        return Scale(low=low, high=high, top=top, bottom=bottom, log=True)
    low, high = min([0.0, *finite]), max([0.0, *finite])
    if low == high:
        high = low + 1.0
    step = linear_step(low, high)
    low, high = floor(low / step + 1e-9) * step, ceil(high / step - 1e-9) * step
    return Scale(low=low, high=high, top=top, bottom=bottom)


def _needs_log(positive: Sequence[float], total: int) -> bool:
    few_below = total - len(positive) <= LOG_NON_POSITIVE * total
    return few_below and max(positive) / min(positive) > LOG_RATIO


def _decades(low: float, high: float) -> tuple[float, float]:
    """The range widened to the next of 1, 2, 5 times a power of ten."""
    steps = [
        m * 10.0**e for e in range(floor(log10(low)) - 1, ceil(log10(high)) + 2) for m in (1, 2, 5)
    ]
    below = [value for value in steps if value <= low * (1 + 1e-9)]
    above = [value for value in steps if value >= high * (1 - 1e-9)]
    return max(below), min(above)


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = floor(log10(low)), ceil(log10(high))
    every = max(1, ceil((last - first) / 6))
    multiples = (1, 2, 5) if last - first <= 2 else (1,)
    return [
        m * 10.0**e for e in range(first, last + 1) if (e - first) % every == 0 for m in multiples
    ]


def linear_step(low: float, high: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that cuts the range in about four."""
    rough = (high - low) / 4
    power = 10.0 ** floor(log10(rough))
    return power * min((1, 2, 5, 10), key=lambda multiple: abs(multiple - rough / power))


def _linear_ticks(low: float, high: float) -> list[float]:
    step = linear_step(low, high)
    first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_label(value: float) -> str:
    """A short label: `0.002`, `50`, `1e-5`."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.6g}"
    mantissa, _, power = f"{value:.1e}".partition("e")
    return f"{float(mantissa):g}e{int(power)}"
