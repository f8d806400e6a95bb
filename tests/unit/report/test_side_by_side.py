from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import product

import pytest

from cptq.report.front import front_figure, points, standalone
from cptq.report.names import short_names, short_tasks
from cptq.report.side_by_side import ComparedModel, SideBySide, dominates, shared_quality
from cptq.report.side_html import side_files
from cptq.report.side_tables import cost_table, difference_table, front_table, side_tables
from cptq.types import EvalResult, Notice, PairedDifference


def result(task: str, metric: str, value: float, higher: bool = False, stderr=None) -> EvalResult:
    return EvalResult(
        task=task,
        version=1,
        metric=metric,
        value=value,
        unit="u",
        higher_is_better=higher,
        samples=10,
        seconds=1,
        stderr=stderr,
    )


def model(name: str, nbytes: int | None, value: float, *more: EvalResult) -> ComparedModel:
    return ComparedModel(
        name=name,
        source=f"/models/{name}",
        kind="causal-lm",
        parameters=1_000_000,
        weight_bytes=nbytes,
        effective_bits=4.25,
        results=(result("wikitext", "perplexity", value, stderr=0.2), *more),
    )


DIFFERENCE = PairedDifference(
    task="wikitext",
    version=1,
    metric="perplexity",
    higher_is_better=False,
    difference=1.5,
    interval=(1.1, 1.9),
    level=0.95,
    p_value=0.0004,
    samples=30,
    method="paired bootstrap",
)


def found(*models: ComparedModel) -> SideBySide:
    return SideBySide(
        command_line="cptq compare", models=models, quality=("wikitext", "perplexity")
    )


DENSE = model("dense", 2_000_000, 20.0, result("speed", "decode", 12.5, True))
FOUR = replace(model("four", 600_000, 21.5), paired=(DIFFERENCE,))
WORSE = model("worse", 700_000, 22.0)
THREE = model("three<&>", 500_000, 30.0)
ALL = found(DENSE, FOUR, WORSE, THREE)


def test_the_front_is_what_nothing_dominates() -> None:
    assert [m.name for m in ALL.models if ALL.on_front(m)] == ["dense", "four", "three<&>"]
    assert dominates((1, 1), (1, 2))
    assert dominates((1, 1), (2, 1))
    assert not dominates((1, 1), (1, 1))
    assert not dominates((1, 2), (2, 1))


def test_the_front_of_many_is_that_of_a_loop() -> None:
    values = [(3, 9), (1, 4), (1, 5), (5, 2), (4, 2), (2, 4), (6, 1), (6, 7), (9, 1)]
    many = found(*(model(str(i), size, loss) for i, (size, loss) in enumerate(values)))
    beaten = {
        str(i)
        for (i, a), (j, b) in product(enumerate(values), repeat=2)
        if i != j and b[0] <= a[0] and b[1] <= a[1] and b != a
    }
    assert {m.name for m in many.models if not many.on_front(m)} == beaten


def test_higher_may_be_better_and_what_is_not_known_is_on_no_front() -> None:
    key = ("glue/sst2", "accuracy")
    good, bad, lost = (
        replace(model(name, size, 1), results=(result(*key, value, True),))
        for name, size, value in (("good", 9, 0.9), ("bad", 9, 0.8), ("lost", None, 0.95))
    )
    side = replace(found(good, bad, lost), quality=key)
    assert [side.on_front(m) for m in side.models] == [True, False, False]
    infinite = found(DENSE, model("broken", 10, float("inf")))
    assert not infinite.on_front(infinite.models[1])


def test_the_tables_say_who_is_how_large_how_good_and_how_sure() -> None:
    rows = front_table(ALL).rows
    assert rows[0] == ("dense", "2 MB", "4.25", "16", "20 ± 0.2", "*")
    assert rows[2][-1] == ""
    table = difference_table(ALL)
    assert table is not None
    assert table.rows == (
        ("four", "wikitext perplexity", "+1.5", "+1.1 to +1.9", "<0.001", "worse"),
    )
    assert "paired bootstrap" in table.note
    costs = cost_table(ALL)
    assert costs is not None
    assert costs.rows[0] == ("dense", "-", "12.5", "-", "-")
    assert cost_table(found(FOUR, WORSE)) is None


def test_the_drawing_is_well_formed_and_says_everything() -> None:
    figure = front_figure(ALL)
    assert figure is not None
    text = standalone(figure, "a > b { content: '<&'; }")
    root = ElementTree.fromstring(text)
    names = [node.text for node in root.iter() if (node.get("class") or "") == "name"]
    assert sorted(names) == ["dense", "four", "three<&>", "worse"]
    assert "four: 600 kB, 21.5 ± 0.2 (front)" in text
    dots = [node for node in root.iter() if (node.get("class") or "").startswith("dot")]
    assert len(dots) == 4
    assert [p.front for p in points(ALL)] == [True, True, False, True]


def test_smaller_lies_left_and_lower_lies_lower() -> None:
    figure = front_figure(ALL)
    assert figure is not None
    dots = [n for n in ElementTree.fromstring(figure.svg).iter() if "cx" in n.attrib]
    xs, ys = [float(d.get("cx")) for d in dots], [float(d.get("cy")) for d in dots]
    assert xs == sorted(xs)  # three, four, worse, dense
    assert ys[0] < ys[2] < ys[1] < ys[3]


def test_one_dot_is_no_front() -> None:
    alone = found(DENSE, model("unknown", None, 3))
    assert front_figure(alone) is None
    assert set(side_files(alone)) == {"compare.json", "compare.html"}


def test_the_files_hold_all_and_load_nothing() -> None:
    side = replace(ALL, notices=(Notice(kind="warning", subject="<b>", message="a & b"),))
    files = side_files(side)
    data = json.loads(files["compare.json"])
    assert [row["on_front"] for row in data["models"]] == [True, True, False, True]
    assert data["models"][1]["paired"][0]["verdict"] == "worse"
    page = files["compare.html"].decode()
    assert "<b>" not in page
    assert "three&lt;&amp;&gt;" in page
    assert not any(word in page for word in ("<script", "href=", "src=", "@import", "url("))
    assert [t.title for t in side_tables(side)][-1] == "Notices"


def test_the_first_shared_result_is_the_quality() -> None:
    one = [result("size", "weight_bytes", 1), result("a", "x", 1), result("b", "y", 1)]
    assert shared_quality([one, one[1:]]) == ("a", "x")
    assert shared_quality([one, one[2:]]) == ("b", "y")
    assert shared_quality([one, one[:1]]) is None


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (("/a/b/dense", "out/four/"), ["dense", "four"]),
        (("a/eval.json", "b/eval.json"), ["a/eval", "b/eval"]),
        (("a/m", "a/m.json"), ["m", "m.json"]),
        (("org/m", "./org/m"), ["org/m", "./org/m"]),
    ],
)
def test_names_are_as_short_as_they_can_be(sources, names) -> None:
    assert short_names(sources) == names


def test_a_file_is_called_by_its_name_in_tables_and_whole_in_json() -> None:
    task = "text:/a/long/way/from/here/heldout.txt"
    assert short_tasks([task, "wikitext"]) == {task: "heldout.txt", "wikitext": "wikitext"}
    two = short_tasks(["text:/x/one/a.txt", "text:/x/two/a.txt"])
    assert list(two.values()) == ["one/a.txt", "two/a.txt"]
    rows = [result(task, "perplexity", value) for value in (9.0, 8.0)]
    models = [replace(ALL.models[i], results=(rows[i],)) for i in (0, 1)]
    pair = replace(models[1], paired=(replace(DIFFERENCE, task=task),))
    side = replace(ALL, models=(models[0], pair), quality=(task, "perplexity"))
    words = str(side_tables(side)) + str(front_figure(side))
    assert "heldout.txt" in words
    assert "/way/" not in words
    assert side.to_dict()["models"][0]["results"][0]["task"] == task
