"""The sparsity family through whole commands: analysis, options of compress, soup."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import cptq
from cptq.errors import ModelError, UsageError

QUICK: dict[str, Any] = {"samples": 4, "seqlen": 32, "device": "cpu"}


def quiet(_event: object) -> None:
    """Take no notice."""


def test_analysis_writes_its_tables_and_figures(
    tiny_model: Callable[[str], Path], tmp_path: Path, short_manual: None
) -> None:
    out = tmp_path / "a"
    cptq.analyze(
        tiny_model("opt"),
        metrics="pq-index",
        sparsity_analysis=True,
        out=out,
        progress=quiet,
        **QUICK,
    )
    tables = {p.stem: json.loads(p.read_text()) for p in (out / "sparsity").glob("*.json")}
    assert set(tables) == {"weight-inequality", "essential-sparsity", "lazy-neurons", "cett"}
    zeros = tables["lazy-neurons"]["text"]
    assert zeros
    assert all(0.2 < row["zero"] < 0.8 for row in zeros.values())
    points = tables["cett"]["points"]
    dense = tables["cett"]["perplexity"]
    assert all(p["perplexity"] <= dense * (1 + p["percent"] / 100) for p in points)
    assert [p["cett"] for p in points] == sorted(p["cett"] for p in points)
    page = (out / "report.html").read_text()
    for title in ("Lazy neurons", "Essential sparsity", "Inequality of weights", "may go"):
        assert title in page


@pytest.mark.parametrize(
    ("sparsity", "score", "profile"),
    [("50%", "sparsegpt", "owl"), ("4:8", "random", "erk"), ("2:4", "magnitude", "pq-adaptive")],
)
def test_options_reach_the_file(
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    same_process: None,
    short_manual: None,
    sparsity: str,
    score: str,
    profile: str,
) -> None:
    outcome = cptq.compress(
        tiny_model("llama"),
        runtime="cptq",
        bits="4",
        group_size=16,
        target="8bit",
        metric="pq-index",
        sparsity=sparsity,
        sparsity_score=score,
        sparsity_profile=profile,
        check_uniform=False,
        pins=(),
        out=tmp_path / "o",
        progress=quiet,
        **QUICK,
    )
    plan = outcome.summary.plan
    assert plan is not None
    size = (tmp_path / "o" / "cptq.safetensors").stat().st_size
    assert size <= plan.budget.limit_bytes


def test_options_without_effect_are_refused() -> None:
    usual = {"model": "m", "runtime": "cptq"}
    for options, word in (
        ({"sparsity_score": "random"}, "--sparsity-score"),
        ({"sparsity_profile": "erk"}, "--sparsity-profile"),
        ({"sparsity": "50%", "sparsity_score": "sparsegpt", "compressor": "nearest"}, "sweep"),
    ):
        with pytest.raises(UsageError, match=word):
            cptq.compress(**usual, **options)


def make_masked(path: Path, source: Path, seed: int, *, other: str = "") -> dict[str, torch.Tensor]:
    path.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (path / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, W in sorted(load_file(source / "model.safetensors").items()):
        moved = W + 0.01 * torch.randn(W.shape, generator=generator)
        if "mlp" in name and W.dim() == 2:
            shift = 1 if name == other else 0
            moved[:, shift::2] = 0
        found[name] = moved.contiguous()
    save_file(found, path / "model.safetensors", metadata={"format": "pt"})
    return found


def test_soup_keeps_the_mask_and_names_what_differs(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_model("llama")
    a, b = (make_masked(tmp_path / n, source, s) for n, s in (("a", 1), ("b", 2)))
    found = cptq.soup(tmp_path / "a", tmp_path / "b", out=tmp_path / "s", progress=quiet)
    made = load_file(tmp_path / "s" / "model.safetensors")
    assert set(made) == set(a)
    for name, W in made.items():
        torch.testing.assert_close(W.double(), (a[name].double() + b[name].double()) / 2)
    masked = [name for name in made if "mlp" in name and made[name].dim() == 2]
    assert found.masked == len(masked) > 0
    assert all(bool((made[name][:, ::2] == 0).all()) for name in masked)
    make_masked(tmp_path / "c", source, 3, other=masked[-1])
    with pytest.raises(ModelError, match=masked[-1].replace(".", r"\.")):
        cptq.soup(tmp_path / "a", tmp_path / "c", out=tmp_path / "t", progress=quiet)
    assert not (tmp_path / "t").exists()
    with pytest.raises(UsageError, match="two models"):
        cptq.soup(tmp_path / "a", out=tmp_path / "t")
