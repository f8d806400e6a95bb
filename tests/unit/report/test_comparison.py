"""Comparisons of models: the front, the tables, the drawing and the files."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import product

from cptq.report.comparison import (
    build_comparison_tables,
    build_cost_table,
    build_difference_table,
    build_front_table,
    build_results_table,
    dominates,
    find_shared_quality,
)
from cptq.report.formatting import shorten_tasks
from cptq.report.front import collect_points, draw_front, make_standalone
from cptq.report.protocol import IN_DOMAIN
from cptq.report.render import render_comparison_files
from cptq.types import Notice
from tests.unit.report.synthetic import DIFFERENCE, make_comparison, make_model, make_result

ALL = make_comparison()
DENSE, FOUR, WORSE, THREE = ALL.models


def test_the_front_is_what_nothing_dominates() -> None:
    assert [m.name for m in ALL.models if ALL.is_on_front(m)] == ["dense", "four", "three<&>"]
    assert dominates((1, 1), (1, 2))
    assert dominates((1, 1), (2, 1))
    assert not dominates((1, 1), (1, 1))
    assert not dominates((1, 2), (2, 1))


def test_the_front_of_many_is_that_of_a_loop() -> None:
    values = [(3, 9), (1, 4), (1, 5), (5, 2), (4, 2), (2, 4), (6, 1), (6, 7), (9, 1)]
    many = make_comparison(
        *(make_model(str(i), size, loss) for i, (size, loss) in enumerate(values))
    )
    beaten = {
        str(i)
        for (i, a), (j, b) in product(enumerate(values), repeat=2)
        if i != j and b[0] <= a[0] and b[1] <= a[1] and b != a
    }
    assert {m.name for m in many.models if not many.is_on_front(m)} == beaten


def test_higher_may_be_better_and_what_is_not_known_is_on_no_front() -> None:
    key = ("glue/sst2", "accuracy")
    good, bad, lost = (
        replace(make_model(name, size, 1), results=(make_result(*key, value, True),))
        for name, size, value in (("good", 9, 0.9), ("bad", 9, 0.8), ("lost", None, 0.95))
    )
    side = replace(make_comparison(good, bad, lost), quality=key)
    assert [side.is_on_front(m) for m in side.models] == [True, False, False]
    infinite = make_comparison(DENSE, make_model("broken", 10, float("inf")))
    assert not infinite.is_on_front(infinite.models[1])


def test_the_tables_say_who_is_how_large_how_good_and_how_sure() -> None:
    rows = build_front_table(ALL).rows
    assert rows[0] == ("dense", "2 MB", "4.25", "16", "20 ± 0.2", "*")
    assert rows[2][-1] == ""
    table = build_difference_table(ALL)
    assert table is not None
    assert table.rows == (
        ("four", "wikitext perplexity", "+1.5", "+1.1 to +1.9", "<0.001", "worse"),
    )
    assert "paired bootstrap" in table.note
    costs = build_cost_table(ALL)
    assert costs is not None
    assert costs.rows[0] == ("dense", "-", "12.5", "-", "-")
    assert build_cost_table(make_comparison(FOUR, WORSE)) is None


def test_the_drawing_is_well_formed_and_says_everything() -> None:
    figure = draw_front(ALL)
    assert figure is not None
    text = make_standalone(figure, "a > b { content: '<&'; }")
    root = ElementTree.fromstring(text)
    names = [node.text for node in root.iter() if (node.get("class") or "") == "name"]
    assert sorted(names) == ["dense", "four", "three<&>", "worse"]
    assert "four: 600 kB, 21.5 ± 0.2 (front)" in text
    dots = [node for node in root.iter() if (node.get("class") or "").startswith("dot")]
    assert len(dots) == 4
    assert [p.front for p in collect_points(ALL)] == [True, True, False, True]


def test_smaller_lies_left_and_lower_lies_lower() -> None:
    figure = draw_front(ALL)
    assert figure is not None
    dots = [n for n in ElementTree.fromstring(figure.svg).iter() if "cx" in n.attrib]
    xs, ys = [float(d.get("cx")) for d in dots], [float(d.get("cy")) for d in dots]
    assert xs == sorted(xs)  # three, four, worse, dense
    assert ys[0] < ys[2] < ys[1] < ys[3]


def test_one_dot_is_no_front() -> None:
    alone = make_comparison(DENSE, make_model("unknown", None, 3))
    assert draw_front(alone) is None
    assert set(render_comparison_files(alone)) == {"compare.json", "compare.html"}


def test_the_files_hold_all_and_load_nothing() -> None:
    side = replace(ALL, notices=(Notice(kind="warning", subject="<b>", message="a & b"),))
    files = render_comparison_files(side)
    data = json.loads(files["compare.json"])
    assert [row["on_front"] for row in data["models"]] == [True, True, False, True]
    assert data["models"][1]["paired"][0]["verdict"] == "worse"
    page = files["compare.html"].decode()
    assert "<b>" not in page
    assert "three&lt;&amp;&gt;" in page
    assert not any(word in page for word in ("<script", "href=", "src=", "@import", "url("))
    assert [t.title for t in build_comparison_tables(side)][-1] == "Notices"


def test_the_first_shared_result_is_the_quality() -> None:
    one = [
        make_result("size", "weight_bytes", 1),
        make_result("a", "x", 1),
        make_result("b", "y", 1),
    ]
    assert find_shared_quality([one, one[1:]]) == ("a", "x")
    assert find_shared_quality([one, one[2:]]) == ("b", "y")
    assert find_shared_quality([one, one[:1]]) is None


def test_a_file_is_called_by_its_name_in_tables_and_whole_in_json() -> None:
    task = "text:/a/long/way/from/here/heldout.txt"
    assert shorten_tasks([task, "wikitext"]) == {task: "heldout.txt", "wikitext": "wikitext"}
    two = shorten_tasks(["text:/x/one/a.txt", "text:/x/two/a.txt"])
    assert list(two.values()) == ["one/a.txt", "two/a.txt"]
    rows = [make_result(task, "perplexity", value) for value in (9.0, 8.0)]
    models = [replace(ALL.models[i], results=(rows[i],)) for i in (0, 1)]
    pair = replace(models[1], paired=(replace(DIFFERENCE, task=task),))
    side = replace(ALL, models=(models[0], pair), quality=(task, "perplexity"))
    words = str(build_comparison_tables(side)) + str(draw_front(side))
    assert "heldout.txt" in words
    assert "/way/" not in words
    assert side.to_dict()["models"][0]["results"][0]["task"] == task


def test_only_the_rows_of_a_model_calibrated_in_domain_say_so() -> None:
    protocol = "windows: 10 of 64 tokens, no BOS"

    def with_protocol(model, in_domain: bool):
        mine, *rest = model.results
        return replace(
            model, results=(replace(mine, protocol=protocol, in_domain=in_domain), *rest)
        )

    models = [with_protocol(m, m.name == "four") for m in ALL.models]
    found = replace(ALL, models=tuple(models))
    for table in (build_front_table(found), build_results_table(found)):
        assert table is not None
        place = table.columns.index(IN_DOMAIN)
        marked = {row[0] for row in table.rows if row[place]}
        assert marked == {"four"}
        assert f"wikitext: {protocol}" in table.note
        assert all(len(row) == len(table.columns) for row in table.rows)
    assert IN_DOMAIN not in build_front_table(ALL).columns
