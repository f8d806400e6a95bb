"""Axes and marks: positions follow values, and what cannot be drawn is said."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cptq.report.plots import (
    HEIGHT,
    LEFT,
    MAX_ROLES,
    WIDTH,
    assign_role_classes,
    draw_errors,
    draw_figures,
    draw_sensitivity,
)
from cptq.report.svg import Scale, choose_scale, escape_text, format_tick, tag
from tests.unit.report import synthetic

FINITE = st.floats(min_value=-1e12, max_value=1e12, allow_subnormal=False)


@given(st.lists(FINITE, max_size=30))
def test_every_value_lies_on_the_axis_in_order(values: list[float]) -> None:
    scale = choose_scale(values, top=10, bottom=200)
    at = [scale.locate(value) for value in sorted(values)]
    assert all(10 <= y <= 200 for y in at)
    assert at == sorted(at, reverse=True)
    if not scale.log:
        unseen = 1e-8 * (scale.high - scale.low)  # far below a pixel
        assert scale.low <= min([0.0, *values]) + unseen
        assert scale.high >= max([0.0, *values]) - unseen


@given(st.lists(st.floats(min_value=1e-12, max_value=1e12), min_size=1, max_size=30))
def test_ticks_are_few_and_within(values: list[float]) -> None:
    scale = choose_scale(values, top=10, bottom=200)
    ticks = scale.list_ticks()
    assert ticks == sorted(ticks)
    assert len(ticks) <= 10
    assert all(10 - 1e-6 <= scale.locate(value) <= 200 + 1e-6 for value in ticks)


def test_the_axis_is_logarithmic_only_where_the_range_needs_it() -> None:
    assert not choose_scale([1.0, 20.0], top=0, bottom=1).log
    assert choose_scale([1.0, 40.0], top=0, bottom=1).log
    assert not choose_scale([0.0] * 5 + [1.0, 40.0], top=0, bottom=1).log
    assert choose_scale([0.0, *[0.1] * 10, 40.0], top=0, bottom=1).log
    assert choose_scale([], top=0, bottom=1).list_ticks()[0] == 0


def test_a_log_axis_halves_a_ratio() -> None:
    scale = Scale(low=1, high=100, top=0, bottom=100, log=True)
    assert scale.locate(10) == pytest.approx(50)
    assert scale.locate(0) == scale.locate(-5) == 100


def test_a_linear_axis_starts_at_zero() -> None:
    scale = choose_scale([0.3, 0.6], top=0, bottom=100)
    assert (scale.low, scale.high) == (0.0, pytest.approx(0.6))
    assert scale.locate(0.3) == pytest.approx(50)


@pytest.mark.parametrize(
    ("value", "label"), [(0, "0"), (0.002, "0.002"), (50, "50"), (1e-5, "1e-5"), (2e6, "2e6")]
)
def test_tick_labels(value: float, label: str) -> None:
    assert format_tick(value) == label


def test_markup_is_escaped() -> None:
    assert escape_text("<a & 'b'>\x00") == "&lt;a &amp; &#x27;b&#x27;&gt;�"
    assert tag("g", class_='"x', x1=1.0, y=None, text_anchor="end") == (
        '<g class="&quot;x" x1="1" text-anchor="end"></g>'
    )


def marks(svg: str, name: str) -> list[ElementTree.Element]:
    return [item for item in ElementTree.fromstring(svg).iter(name) if item.get("class") != "band"]


def test_one_dot_per_unit_as_high_as_its_score() -> None:
    summary = synthetic.make_summary(blocks=3)
    table = summary.sensitivity["cca"]
    found = marks(draw_sensitivity(table, summary.units, "x").svg, "circle")
    assert len(found) == len(summary.units)
    by_height = sorted(found, key=lambda dot: float(dot.get("cy", "0")))
    highest = max(table.per_unit, key=lambda name: table.per_unit[name])
    assert (by_height[0].findtext("title") or "").startswith(highest)
    xs = [float(dot.get("cx", "0")) for dot in found]
    assert xs == sorted(xs)
    assert LEFT <= xs[0] < xs[-1] <= WIDTH


def test_blocks_are_set_apart() -> None:
    summary = synthetic.make_summary(blocks=2)
    found = marks(draw_sensitivity(summary.sensitivity["cca"], summary.units, "x").svg, "circle")
    xs = [float(dot.get("cx", "0")) for dot in found]
    gaps = [b - a for a, b in pairwise(xs)]
    assert gaps[3] == pytest.approx(1.8 * gaps[0], rel=0.01)


def test_what_is_not_finite_is_left_out_and_said() -> None:
    summary = synthetic.make_summary(blocks=2)
    table = summary.sensitivity["output"]
    first, second = summary.units[0].name, summary.units[1].name
    odd = replace(table, per_unit={**table.per_unit, first: float("nan"), second: float("inf")})
    figure = draw_sensitivity(odd, summary.units, "x")
    assert len(marks(figure.svg, "circle")) == len(summary.units) - 2
    assert "2 values not finite, not drawn" in figure.caption
    nothing = replace(table, per_unit=dict.fromkeys(table.per_unit, float("nan")))
    assert "nothing to draw" in draw_sensitivity(nothing, summary.units, "x").svg


def test_zero_on_a_log_axis_is_hollow_and_said() -> None:
    summary = synthetic.make_summary(blocks=8)
    table = summary.sensitivity["taylor"]
    odd = replace(table, per_unit={**table.per_unit, summary.units[0].name: 0.0})
    figure = draw_sensitivity(odd, summary.units, "x")
    assert "log scale" in figure.caption
    assert "1 value of zero or below" in figure.caption
    assert sum("hollow" in (dot.get("class") or "") for dot in marks(figure.svg, "circle")) == 1


def test_errors_have_a_dot_for_each_measured_kind() -> None:
    summary = synthetic.make_summary(blocks=2)
    figure = draw_errors(summary)
    assert figure is not None
    assert len(marks(figure.svg, "circle")) == 2 * len(summary.results)
    weights_only = tuple(replace(row, output_error=None) for row in summary.results)
    figure = draw_errors(replace(summary, results=weights_only))
    assert figure is not None
    assert len(marks(figure.svg, "circle")) == len(summary.results)
    assert [words for _, words in figure.legend] == ["weight error"]
    assert draw_errors(replace(summary, results=())) is None


def test_many_roles_share_the_last_colour() -> None:
    classes = assign_role_classes([f"role{index}" for index in range(20)])
    assert len(set(classes.values())) == MAX_ROLES
    summary = synthetic.make_summary(blocks=5)
    units = tuple(replace(unit, role=f"r{i}") for i, unit in enumerate(summary.units))
    figure = draw_sensitivity(summary.sensitivity["cca"], units, "x")
    assert figure.legend[-1] == ("r7", "13 other roles")
    assert len(figure.legend) == MAX_ROLES


@pytest.mark.parametrize("blocks", [1, 3, 80])
def test_every_drawing_is_xml_within_its_frame(blocks: int) -> None:
    for figure in draw_figures(synthetic.make_summary(blocks=blocks)):
        root = ElementTree.fromstring(figure.svg)
        for item in root.iter():
            for key, high in (("cx", WIDTH), ("cy", HEIGHT), ("x", WIDTH), ("y", HEIGHT)):
                assert 0 <= float(item.get(key, "0")) <= high
        assert not re.search(r"nan|inf\b", re.sub(r"<(title|desc).*?</\1>", "", figure.svg))


def test_a_model_without_blocks_is_drawn_too() -> None:
    summary = synthetic.make_summary(blocks=1)
    units = tuple(replace(unit, block=None) for unit in summary.units)
    svg = draw_sensitivity(summary.sensitivity["cca"], units, "x").svg
    assert len(marks(svg, "circle")) == len(units)
