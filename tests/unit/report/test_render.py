"""The rendered files: complete, self-contained, and safe against what a model may be called."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

from cptq.report import ModelFacts, Summary
from cptq.report.derived import build_json
from cptq.report.formatting import Table
from cptq.report.render import (
    FILES,
    escape_cell,
    quote_code,
    render_files,
    render_html,
    render_json,
    render_markdown,
    render_reports,
    render_table,
)
from cptq.types import Comparison, Notice, join_results
from cptq.types.samples import build_ratios

EVIL = "<script>alert(1)</script>\"'&|`\x1b[31m"
VOID = {"meta", "br", "link", "img"}


class Page(HTMLParser):
    """Checks that every element is closed in order; keeps names, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_lists_of_numbers_take_one_line_and_mean_the_same(summary: Summary) -> None:
    scores = build_ratios([1.5, -2e-9, 3], [1, 2, 3])
    found = replace(summary.evaluation[0], per_sample=scores, notes=("[\n 1,\n 2\n]",))
    changed = replace(summary, comparison=join_results([found]))
    text = render_json(changed)
    assert '"numerators": [1.5,-2e-09,3]' in text
    assert json.loads(text) == json.loads(json.dumps(build_json(changed)))


def test_three_files_are_made(summary: Summary) -> None:
    files = render_files(summary)
    assert set(files) == set(FILES.values())
    for kind, text in render_reports(summary).items():
        assert files[FILES[kind]].decode("utf-8") == text
    assert json.loads(files[FILES["json"]])["command"] == "compress"


def test_the_page_is_well_formed_and_fetches_nothing(summary: Summary) -> None:
    page = Page(render_html(summary))
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.names)
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "href", "style", "xlink:href")
        assert "://" not in (value or "")
    assert "url(" not in render_html(summary)
    assert "@import" not in render_html(summary)
    assert "prefers-color-scheme: dark" in render_html(summary)


def test_the_page_shows_every_part(summary: Summary) -> None:
    text = " ".join(Page(render_html(summary)).words)
    for words in (
        "Evaluation", "Size", "Layers per width", "Notices", "Bits of every layer",
        "Before and after", "Bytes by part", "Size and predicted loss",
        "Where the error accumulates", "Repeat it",
        "Sensitivity over depth by all metrics",
        "Sensitivity by output", "Sensitivity by taylor", "Sensitivity by cca",
        "Sensitivity by pruning", "Error per layer", "Most sensitive by cca", "Calibration",
        "All layers", "All scores", "Times", "Settings", "Versions", "nominal bits", "4.250",
        "111,998,320 bytes", "embeddings stay dense", "0.1 was used",
    ):  # fmt: skip
        assert words in text, words
    for notice in summary.notices:
        assert notice.message in text


def test_every_drawing_has_a_name_and_a_description(summary: Summary) -> None:
    page = Page(render_html(summary))
    drawings = page.names.count("svg")
    assert drawings == 10
    cells = page.attributes.count(("class", "cell"))
    assert cells == len(summary.units)
    assert page.attributes.count(("role", "img")) == drawings - 1 + cells  # the map is a group
    idents = [value for name, value in page.attributes if name == "id"]
    assert len(idents) == len(set(idents)) == 2 * drawings
    for name, value in page.attributes:
        if name == "aria-labelledby":
            assert set(str(value).split()) <= set(idents)


def evil(summary: Summary) -> Summary:
    """Every text that comes from outside is hostile."""
    return replace(
        summary,
        command_line=f"cptq compress {EVIL}",
        model=ModelFacts(
            source=EVIL, kind="causal-lm", family=EVIL, parameters=1, dense_bytes=1, fingerprint="f"
        ),
        layers=tuple(replace(layer, name=layer.name + EVIL, role=EVIL) for layer in summary.layers),
        units=tuple(replace(unit, role=EVIL) for unit in summary.units),
        notices=(Notice(kind="warning", subject=EVIL, message=EVIL),),
        settings={EVIL: EVIL},
        versions={EVIL: EVIL},
        baseline_source=EVIL,
        sensitivity={
            EVIL: replace(summary.sensitivity["cca"], metric=EVIL, score_unit=EVIL),
        },
    )


def test_hostile_names_stay_text(summary: Summary) -> None:
    html = render_html(evil(summary))
    page = Page(html)
    assert "script" not in page.names
    assert page.open == []
    assert "<script" not in html
    markdown = render_markdown(evil(summary))
    outside_code = [line for line in markdown.splitlines() if not line.startswith("`")]
    assert not any("<script" in line.replace("\\<", "") for line in outside_code)


def test_an_analysis_has_no_plan_and_no_results(summary: Summary) -> None:
    bare = replace(
        summary, command="analyze", plan=None, budget=None, size=None, results=(),
        verification=None, comparison=Comparison(), front=(), quality=None,
    )  # fmt: skip
    text = " ".join(Page(render_html(bare)).words)
    assert "Sensitivity by output" in text
    for words in ("Bits of every layer", "Error per layer", "Layers per width", "nominal bits"):
        assert words not in text
    assert "Most sensitive by output" in render_markdown(bare)


def test_many_notices_are_all_there(summary: Summary) -> None:
    notices = [
        Notice(kind="fallback" if index % 2 else "skipped", subject=f"l{index}.", message="so")
        for index in range(100)
    ]
    text = " ".join(Page(render_html(replace(summary, notices=tuple(notices)))).words)
    assert "More notices" in text
    for notice in notices:
        assert notice.subject in text


def test_an_evaluation_alone(summary: Summary) -> None:
    bare = Summary(
        command="eval", command_line="cptq eval m", model=summary.model,
        comparison=join_results(summary.evaluation),
    )  # fmt: skip
    page = Page(render_html(bare))
    assert page.open == []
    assert "svg" not in page.names
    assert "baseline" not in render_markdown(bare)
    assert "token\\_perplexity" in render_markdown(bare)


def test_markdown_tables_are_rectangles(summary: Summary) -> None:
    for block in render_markdown(summary).split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        bars = {row.replace("\\|", "").count("|") for row in rows}
        assert len(bars) <= 1, block


def test_markdown_escapes() -> None:
    assert escape_cell("a|b_c*\n<d>") == "a\\|b\\_c\\* \\<d\\>"
    assert quote_code("a`b``c") == "```a`b``c```"
    assert quote_code("`a`") == "`` `a` ``"
    folded = Table(title="T", columns=("a", "b"), rows=(("1", "2"),), right=("b",), folded=True)
    assert render_table(folded) == (
        "<details><summary>T</summary>\n\n| a | b |\n| --- | --: |\n| 1 | 2 |\n\n</details>"
    )


def test_reports_need_no_torch() -> None:
    code_ = "import sys, cptq.report.render; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code_], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
