"""Figures of `bench` as numbers, tables of 80 columns and JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cptq.cli.console import Console
from cptq.report.bench import (
    LONGEST_NAME,
    Bench,
    BenchedModel,
    build_bench_tables,
    compute_ratio,
    compute_spread,
    format_ratio,
    name_models,
)
from cptq.types import Figure

LONG = "a-model-of-an-uncommonly-long-name-that-goes-on-3.5bit"


def make_model(name: str, scale: float, kind: str = "causal-lm", **more: float) -> BenchedModel:
    speeds = ("prefill", "decode") if kind == "causal-lm" else ("forward",)
    first = "first_token" if kind == "causal-lm" else "first_output"
    figures = [
        Figure(name="load", values=(1.5 * scale,)),
        Figure(name=first, values=(0.124 * scale,), batch_size=1),
        *(
            Figure(name=speed, values=(900.0 * scale, 1e3 * scale, 1.2e3 * scale), batch_size=size)
            for size in (1, 8)
            for speed in speeds
        ),
        Figure(name="file", values=(123_456_789.0 * scale,)),
        Figure(name="loaded_memory", values=(234_567_890.0 * scale,)),
        Figure(name="used_memory", values=(256_789_012.0 * scale,)),
        Figure(name="peak_memory", values=(345_678_901.0 * scale,)),
        *(Figure(name=figure, values=(value,)) for figure, value in more.items()),
    ]
    return BenchedModel(
        name=name, source=name, kind=kind, way="generate", device="cpu", dtype="float32",
        import_bytes=1.0, figures=tuple(figures),
    )  # fmt: skip


def make_bench(*models: BenchedModel) -> Bench:
    return Bench(
        command_line="cptq bench", models=models, prompt_tokens=128, new_tokens=32,
        batch_sizes=(1, 8), repeats=3, threads=2, seed=0, cpu="A CPU",
    )  # fmt: skip


def test_medians_ratios_and_spreads() -> None:
    assert Figure(name="load", values=(3.0, 1.0, 2.0)).median == 2.0
    assert compute_ratio(3.0, 2.0) == 1.5
    assert [compute_ratio(*p) for p in ((None, 1.0), (1.0, None), (1.0, 0.0), (-1.0, 2.0))] == (
        [None] * 4
    )
    assert compute_spread([2.0, 1.0, 4.0]) == 1.5
    assert compute_spread([2.0]) is None
    assert compute_spread([0.0, 0.0]) is None


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        *((1.0, "1.00x"), (9.994, "9.99x"), (9.996, "10.0x"), (99.96, " 100x")),
        *((1234.5, "1234x"), (0.004, "0.00x"), (None, "    -")),
    ],
)
def test_ratios_have_one_width(ratio: float | None, text: str) -> None:
    assert format_ratio(ratio) == text


def test_names_are_short_and_distinct() -> None:
    assert name_models(["a/x", "b/y.gguf"]) == ["x", "y.gguf"]
    assert name_models(["a/x", "b/x"]) == ["a/x", "b/x"]
    assert name_models(["m", "m"]) == ["m (1)", "m (2)"]
    long = name_models([LONG, "m"])
    assert long[0].startswith("…")
    assert long[0].endswith("-3.5bit")
    alike = name_models([f"{letter}{LONG}" for letter in "ab"])
    assert len(set(alike)) == 2
    assert all(len(name) <= LONGEST_NAME for name in (*long, *alike))


@pytest.mark.parametrize("kind", ["causal-lm", "classifier"])
@pytest.mark.parametrize("scale", [0.01, 1.0, 37.0, 6543.0])
def test_tables_fit_eighty_columns_and_break_no_word(
    kind: str, scale: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names = name_models([f"some/{LONG}", "m"])
    found = make_bench(make_model(names[0], 1.0, kind), make_model(names[1], scale, kind))
    tables = build_bench_tables(found)
    Console().print_tables(tables)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    words = " ".join(lines).split()
    for table in tables:
        for cell in (*table.columns, *(cell for row in table.rows for cell in row)):
            assert any(cell in line for line in lines), cell
        assert all(word in words for word in table.note.split())


def test_what_the_tables_say() -> None:
    found = make_bench(make_model("one", 1.0), make_model("two", 0.5))
    speed, start, memory = build_bench_tables(found)
    assert speed.rows == (
        ("one", "1", "1,000 1.00x", "1,000 1.00x"),
        ("two", "1", "500 0.50x", "500 0.50x"),
        ("one", "8", "1,000 1.00x", "1,000 1.00x"),
        ("two", "8", "500 0.50x", "500 0.50x"),
    )
    assert "up to 30% of their median" in speed.note
    assert "2 threads of A CPU" in speed.note
    assert start.rows[1] == ("two", "61.73 MB 0.50x", "0.75 s 0.50x", "0.062 s 0.50x")
    assert memory.rows[0] == ("one", "234.6 MB 1.00x", "256.8 MB 1.00x", "345.7 MB 1.00x")


def test_a_device_has_a_table_of_its_own() -> None:
    on_device = {"loaded_device_memory": 2e9, "peak_device_memory": 3e9}
    found = make_bench(make_model("one", 1.0, **on_device), make_model("two", 1.0))
    assert build_bench_tables(found)[-1].rows == (
        ("one", "2 GB 1.00x", "3 GB 1.00x"),
        ("two", "-", "-"),
    )


def test_json_holds_every_repetition() -> None:
    found = make_bench(make_model("one", 1.0), make_model("two", 0.5))
    data: dict[str, Any] = json.loads(json.dumps(found.to_dict()))
    row = data["models"][1]["figures"][3]
    assert row == {
        "name": "decode", "batch_size": 1, "unit": "tokens per second", "higher_is_better": True,
        "median": 500.0, "spread": 0.3, "ratio_to_first": 0.5, "values": [450.0, 500.0, 600.0],
    }  # fmt: skip
    assert data["schema"] == 1
