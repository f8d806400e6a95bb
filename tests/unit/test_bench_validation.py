"""The tables of `scripts/bench_validation`, from the reports of two seeds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TinyModel
from tests.test_model_scripts import script


def report(seed: int, ranks: dict[str, float], plans: dict[str | None, float]) -> dict[str, Any]:
    """What `cptq analyze --validate` writes, as far as the tables read it."""
    return {
        "validation": {
            "compressor": "gptq",
            "judge_tokens": 2048,
            "seed": seed,
            "pairs": [{}] * 48,
            "agreements": [
                {
                    "metric": name,
                    "spearman_within": {"value": x},
                    "kendall_within": {"value": x - 0.1},
                }
                for name, x in ranks.items()
            ],
            "trials": [
                {
                    "target": "3bit",
                    "metric": name,
                    "allocator": "knapsack" if name else "even",
                    "divergence": x,
                }
                for name, x in plans.items()
            ],
        }
    }


def test_tables_hold_the_mean_and_the_range_of_the_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A metric that one seed lacks is shown with the seeds that have it; nothing is run again."""
    found = [
        report(0, {"cca": 0.3, "output": 0.9, "kl": 1.0}, {None: 2.0, "cca": 3.0, "output": 1.0}),
        report(1, {"cca": 0.1, "output": 0.8}, {None: 1.0, "cca": 0.9, "output": 0.8}),
    ]
    for seed, each in enumerate(found):
        (tmp_path / f"tiny-{seed}").mkdir()
        (tmp_path / f"tiny-{seed}" / "report.json").write_text(json.dumps(each))
    words = ["bench_validation", "tiny", "--seeds", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    script("bench_validation").main()
    lines = capsys.readouterr().out.splitlines()
    ranks = [line for line in lines if line.startswith("| `") and "knapsack" not in line]
    assert ranks == [
        "| `kl` | 1 | 1.00 | 0.90 |",
        "| `output` | 2 | 0.85 (0.80 to 0.90) | 0.75 (0.70 to 0.80) |",
        "| `cca` | 2 | 0.20 (0.10 to 0.30) | 0.10 (0.00 to 0.20) |",
    ]
    plans = [line for line in lines if "knapsack" in line]
    assert plans == [
        "| `output`, knapsack | 2 | 0.65 (0.50 to 0.80) | 0.632 |",
        "| `cca`, knapsack | 2 | 1.20 (0.90 to 1.50) | 1.162 |",
    ]
    assert "Divergence under `even` itself: 1.5" in lines


@pytest.mark.parametrize(
    ("arch", "text"), [("gpt2", "auto"), ("llama", "auto"), ("bert", "glue/sst2")]
)
def test_the_text_is_that_of_the_use(arch: str, text: str, tiny_model: TinyModel) -> None:
    """GPT-2's class ends in Model, as an encoder's does."""
    assert script("_uses").find_use(str(tiny_model(arch)))[1] == text


def test_a_model_that_is_not_there_is_named_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = ["bench_validation", str(tmp_path / "missing"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match=r"missing is no directory"):
        script("bench_validation").main()
    assert not out.exists()
