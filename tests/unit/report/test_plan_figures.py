"""Bytes by part, the map of bits, the predicted front, sparsity and depth, on a synthetic run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cptq.report import Summary
from cptq.report.before_after import build_before_after_table, tell
from cptq.report.depth import draw_depth
from cptq.report.layer_map import draw_map, make_cell
from cptq.report.parts import SCALES, VOCABULARY_16, advise, measure_parts
from cptq.report.plan_front import draw_run_front
from cptq.report.plans import build_front_table
from cptq.report.sensitivity_axis import draw_sensitivity_axis, measure_depth, split_depth
from cptq.report.sparse import build_sparsity_table
from cptq.report.summary import map_layer_choices
from cptq.sensitivity.validation.pairs import classify_depth
from cptq.types import Candidate


def test_parts_are_what_the_layers_take(summary: Summary) -> None:
    parts = {part.name: part for part in measure_parts(summary)}
    assert parts[VOCABULARY_16].nbytes == 2 * 49152 * 576  # BF16; the tied head is not there twice
    choices = map_layer_choices(summary)
    specs = {layer.name: layer for layer in summary.layers}
    codes = sum(specs[name].numel * choice.bits // 8 for name, choice in choices.items())
    assert parts[SCALES].nbytes == sum(row.nbytes for row in summary.results) - codes
    assert summary.size is not None
    assert sum(part.nbytes for part in parts.values()) == summary.size.file_bytes
    assert sum(part.share for part in parts.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("runtime", "words"),
    [("transformers", "--runtime cptq"), ("vllm", "--runtime cptq"), ("cptq", "--embedding-bits")],
)
def test_the_option_that_helps_is_named(summary: Summary, runtime: str, words: str) -> None:
    assert words in advise(replace(summary, settings={"runtime": runtime}))


def test_layers_that_the_plan_leaves_in_16_bits_are_blamed_on_the_target(summary: Summary) -> None:
    assert summary.plan is not None
    assert summary.size is not None
    wide = Candidate(bits=16, group_size=0)
    choices = dict.fromkeys(summary.plan.choices, wide)
    plan = replace(summary.plan, choices=choices)
    results = tuple(replace(row, candidate=wide) for row in summary.results)
    assert "a smaller --target" in advise(replace(summary, plan=plan, results=results))
    assert "a smaller --target" not in advise(summary)


def test_the_map_has_a_cell_per_unit_with_its_numbers(summary: Summary) -> None:
    figure = draw_map(summary)
    assert figure is not None
    assert summary.plan is not None
    assert figure.svg.count('class="cell" tabindex="0"') == len(summary.units)
    unit = summary.units[0]
    cell = make_cell(summary, [unit])
    assert cell.text == str(summary.plan.choices[unit.name].bits)
    for words in (unit.name, "score", "output error", "B"):
        assert words in cell.words
    sparse = Candidate(bits=4, group_size=64, sparsity=0.5, pattern="2:4")
    choices = {**summary.plan.choices, unit.name: sparse}
    changed = replace(summary, plan=replace(summary.plan, choices=choices))
    assert make_cell(changed, [unit]).text == "4*"
    assert make_cell(changed, [unit, summary.units[1]]).text.endswith("*")
    assert draw_map(replace(summary, plan=None)) is None


def test_sparse_weights_are_counted(summary: Summary) -> None:
    assert build_sparsity_table(summary) is None
    assert summary.plan is not None
    half = Candidate(bits=4, group_size=64, sparsity=0.5, pattern="unstructured")
    all_sparse = replace(summary.plan, choices=dict.fromkeys(summary.plan.choices, half))
    table = build_sparsity_table(replace(summary, plan=all_sparse))
    assert table is not None
    assert table.note.startswith("50%")
    assert sum(int(row[3]) for row in table.rows) == len(summary.results)


def test_the_front_names_the_plan_that_was_carried_out(summary: Summary) -> None:
    figure = draw_run_front(summary)
    assert figure is not None
    assert figure.svg.count("<polyline") == 2
    assert figure.svg.count("<circle") == 1
    assert ">carried out</text>" in figure.svg
    table = build_front_table(summary)
    assert table is not None
    assert summary.plan is not None
    assert [row[-1] for row in table.rows].count("carried out") == sum(
        point.nbytes == summary.plan.predicted_bytes for point in summary.front
    )
    assert draw_run_front(replace(summary, front=summary.front[:1])) is None


def test_outer_blocks_are_the_first_and_last_30_percent(summary: Summary) -> None:
    assert split_depth(range(10)) == ([0, 1, 2], [3, 4, 5, 6], [7, 8, 9])
    assert split_depth([5, 6]) == ([5], [], [6])
    for blocks in range(2, 40):  # as cptq analyze --validate draws its pairs
        parts = zip(("first", "middle", "last"), split_depth(range(blocks)), strict=True)
        mine = {block: name for name, part in parts for block in part}
        assert mine == {block: classify_depth(block, blocks) for block in range(blocks)}
    for means in measure_depth(summary).values():
        whole = [means["first"]] * 2 + [means["middle"]] + [means["last"]] * 2
        assert sum(whole) / 5 == pytest.approx(1)
    one = {"cca": summary.sensitivity["cca"]}
    assert draw_sensitivity_axis(summary) is not None
    assert draw_sensitivity_axis(replace(summary, sensitivity=one)) is None


def test_what_was_lost_is_told_or_that_it_was_not_measured(summary: Summary) -> None:
    assert "perplexity 20 before, 21.5 after" in tell(summary)[1]
    table = build_before_after_table(summary)
    assert table is not None
    assert table.rows[-1][3:5] == ("+1.5", "+1.1 to +1.9")
    silent = replace(summary, quality=None)
    assert "not measured" in tell(silent)[1]
    assert draw_depth(silent) is None
    assert draw_depth(summary) is not None
