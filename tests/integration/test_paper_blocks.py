"""`scripts/reproduce_paper --part blocks` on a tiny model: the paper's algorithm beside cptq's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from cptq.types import Candidate
from tests.conftest import TinyModel
from tests.test_model_scripts import script

pytestmark = pytest.mark.usefixtures("short_manual")
WORDS = ("--part", "blocks", "--calibration", "pydoc", "--samples", "2", "--seeds", "2")


def run(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    given = ["reproduce_paper", str(model), *WORDS, "--out", str(out), *words]
    monkeypatch.setattr(sys, "argv", given)
    script("reproduce_paper").main()


def read(out: Path, model: Path, seed: int) -> dict[str, Any]:
    file = out / model.name / f"blocks-8-4-3-nearest-{seed}.json"
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.slow
def test_the_papers_algorithm_and_ours_at_its_bytes(
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, out = tiny_model("llama", num_hidden_layers=3), tmp_path / "out"
    words = ("--compressor", "nearest", "--widths", "8,4,3")
    run(model, out, monkeypatch, *words)
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines] == [
        "algorithm", "---", "CMPQ", "CMPQ, first correlation", "PMPQ", "TDMPQ",
    ]  # fmt: skip
    assert "ratio: kl, 8/4/3" in lines[0]
    for seed in (0, 1):
        check_plans(read(out, model, seed))
    first, second = (read(out, model, seed)["scores"]["TDMPQ"] for seed in (0, 1))
    assert first["scores"] != second["scores"]
    assert len(first["spread"]) == 3
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}
    assert len(before) == 2
    run(model, out, monkeypatch, *words)
    assert capsys.readouterr().out == printed
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.json")} == before


def check_plans(found: dict[str, Any]) -> None:
    """Every block is one decision, opponents keep its bytes, and the samples are windows."""
    bits = found["bits"]
    for plan in found["plans"]:
        for name, label in plan["choices"].items():
            block = int(name.split(".layers.")[1].split(".")[0])
            assert Candidate.parse(label).bits == plan["blocks"][block]
        scores = found["scores"][plan["algorithm"]]["scores"]
        assert plan["blocks"][scores.index(max(scores))] == max(plan["blocks"]) == bits[0]
        assert plan["blocks"][scores.index(min(scores))] == min(plan["blocks"]) == bits[2]
        names = ("output", "kl", "even")
        widths = ("all widths", "/".join(map(str, bits)))
        assert list(plan["opponents"]) == [f"{name}, {w}" for name in names for w in widths]
        for name, opponent in plan["opponents"].items():
            assert opponent["file_bytes"] <= plan["file_bytes"]
            assert len(opponent["samples"]) == len(plan["samples"]) >= 4
            if not name.endswith("all widths"):
                used = {Candidate.parse(label).bits for label in opponent["choices"].values()}
                assert used <= set(bits)
        tokens = found["judge_tokens"] / len(plan["samples"])
        assert tokens == 256  # whole windows of the model, not tokens


def test_ratios_are_paired() -> None:
    ours = script("_paper_blocks")
    found = ours.compare([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert found.value == pytest.approx(0.5)
    assert found.log_error == pytest.approx(0, abs=1e-12)  # what a sample adds to both cancels
    a, b = [1.0, 2.5, 3.0, 1.5], [2.0, 4.0, 7.0, 3.0]
    found = ours.compare(a, b)
    r = fmean(a) / fmean(b)
    residuals = [x - r * y for x, y in zip(a, b, strict=True)]
    error = (sum(d * d for d in residuals) / 3 / 4) ** 0.5 / fmean(b)
    assert found.value * found.log_error == pytest.approx(error)
    same = ours.compare(a, a)
    assert (same.value, same.log_error, same.clear) == (1.0, 0.0, False)
    both = ours.combine([ours.Ratio(0.5, 0.1), ours.Ratio(2.0, 0.1)])
    assert (both.value, both.clear) == (pytest.approx(1.0), False)
    assert both.log_error == pytest.approx(0.1)
    assert ours.spell_ratio([ours.Ratio(0.5, 0.1)]) == "**0.5 ± 0.05**"
    assert ours.spell_ratio([ours.Ratio(0.9, 0.1)] * 2) == "0.9 ± 0.09 (0.9 to 0.9)"
