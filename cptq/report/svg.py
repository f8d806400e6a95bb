"""SVG elements with escaped text, the `Figure` they make up, and axes that choose their ticks.

Colours are classes of the page's style sheet, so the same drawing works in light and dark mode. A
drawing loads no resources and runs no scripts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, isfinite, log10

#: an axis is logarithmic if the largest positive value is this many times the smallest
LOG_RATIO = 30.0
#: ... and at most this share of the values is zero or negative
LOG_NON_POSITIVE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A drawing with its title, caption and legend; legend entries are (css class, label)."""

    ident: str
    title: str
    caption: str
    svg: str
    legend: tuple[tuple[str, str], ...] = ()


def escape_text(value: object) -> str:
    """Escape a value for an element's content and replace control characters.

    Source: XML 1.0 section 2.2 forbids most control characters even when escaped.
    """
    shown = "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in str(value)
    )
    return escape(shown, quote=True)


def tag(name: str, *children: str, **attributes: object) -> str:
    """Return one element. `class_` stands for `class`, other underscores for hyphens.

    Children are escaped markup. Attribute values are escaped here, numbers are rounded to a
    hundredth of a pixel, and None omits the attribute.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_format_attribute(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{written}>{''.join(children)}</{name}>"


def _format_attribute(value: object) -> str:
    return (
        f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else escape_text(value)
    )


def wrap_svg(
    body: str,
    ident: str,
    title: str,
    description: str,
    size: tuple[float, float],
    xmlns: str | None = None,
    *,
    group: bool = False,
) -> str:
    """Wrap a drawing of (width, height) as one image with an accessible name and description.

    `group`: its parts have names of their own, which an image would hide.
    """
    return tag(
        "svg",
        tag("title", escape_text(title), id=f"{ident}-title"),
        tag("desc", escape_text(description), id=f"{ident}-desc"),
        body,
        xmlns=xmlns,
        viewBox=f"0 0 {size[0]:g} {size[1]:g}",
        role="group" if group else "img",
        aria_labelledby=f"{ident}-title {ident}-desc",
        class_="chart",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """A map from values to pixels: `low` is at `bottom`, `high` at `top`."""

    low: float
    high: float
    top: float
    bottom: float
    log: bool = False

    def locate(self, value: float) -> float:
        """Return the pixel of a value; on a log axis, zero and below are at the bottom."""
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

    def list_ticks(self) -> list[float]:
        """Return the values of the grid lines, lowest first."""
        found = (
            _list_log_ticks(self.low, self.high)
            if self.log
            else _list_linear_ticks(self.low, self.high)
        )
        slack = 1e-9 * (self.high - self.low)
        return [value for value in found if self.low - slack <= value <= self.high + slack]


def choose_scale(values: Sequence[float], *, top: float, bottom: float) -> Scale:
    """Return a scale over all finite values: from zero, or logarithmic if they span decades."""
    finite = [value for value in values if isfinite(value)]
    positive = [value for value in finite if value > 0]
    if positive and _prefer_log(positive, len(finite)):
        low, high = _widen_to_decades(min(positive), max(positive))
        return Scale(low=low, high=high, top=top, bottom=bottom, log=True)
    low, high = min([0.0, *finite]), max([0.0, *finite])
    if low == high:
        high = low + 1.0
    step = choose_step(low, high)
    low, high = floor(low / step + 1e-9) * step, ceil(high / step - 1e-9) * step
    return Scale(low=low, high=high, top=top, bottom=bottom)


def _prefer_log(positive: Sequence[float], total: int) -> bool:
    few_below = total - len(positive) <= LOG_NON_POSITIVE * total
    return few_below and max(positive) / min(positive) > LOG_RATIO


def _widen_to_decades(low: float, high: float) -> tuple[float, float]:
    """Widen a range to the next of 1, 2, 5 times a power of ten."""
    steps = [
        m * 10.0**e for e in range(floor(log10(low)) - 1, ceil(log10(high)) + 2) for m in (1, 2, 5)
    ]
    below = [value for value in steps if value <= low * (1 + 1e-9)]
    above = [value for value in steps if value >= high * (1 - 1e-9)]
    return max(below), min(above)


def _list_log_ticks(low: float, high: float) -> list[float]:
    first, last = floor(log10(low)), ceil(log10(high))
    every = max(1, ceil((last - first) / 6))
    multiples = (1, 2, 5) if last - first <= 2 else (1,)
    return [
        m * 10.0**e for e in range(first, last + 1) if (e - first) % every == 0 for m in multiples
    ]


def choose_step(low: float, high: float) -> float:
    """Return a step of 1, 2 or 5 times a power of ten that divides the range into about four."""
    rough = (high - low) / 4
    power = 10.0 ** floor(log10(rough))
    return power * min((1, 2, 5, 10), key=lambda multiple: abs(multiple - rough / power))


def _list_linear_ticks(low: float, high: float) -> list[float]:
    step = choose_step(low, high)
    first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def format_tick(value: float) -> str:
    """Return a short label: `0.002`, `50`, `1e-5`."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.6g}"
    mantissa, _, power = f"{value:.1e}".partition("e")
    return f"{float(mantissa):g}e{int(power)}"


def draw_levels(
    scale: Scale,
    *,
    left: float,
    right: float,
    gap: float = 8.0,
    ticks: Sequence[float] | None = None,
) -> str:
    """Draw a horizontal line with a label `gap` pixels to its left at each tick."""
    drawing = ""
    for value in scale.list_ticks() if ticks is None else ticks:
        y = scale.locate(value)
        drawing += tag("line", class_="grid", x1=left, x2=right, y1=y, y2=y)
        label = format_tick(value)
        drawing += tag("text", label, class_="tick", x=left - gap, y=y + 4, text_anchor="end")
    return drawing


def draw_columns(across: Scale, *, top: float, bottom: float) -> str:
    """Draw a vertical line with a label below it at each tick."""
    drawing = ""
    for value in across.list_ticks():
        x = across.locate(value)
        drawing += tag("line", class_="grid", x1=x, x2=x, y1=top, y2=bottom)
        label = format_tick(value)
        drawing += tag("text", label, class_="tick", x=x, y=bottom + 16, text_anchor="middle")
    return drawing
