"""Two dense models of one tokenizer, an artifact, and two texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cptq.data.overlap import build_sketch, encode_sketch

TEXT = " ".join(f"Once upon a time there were {i} small cats and a warm sun." for i in range(80))
OTHER = " ".join(f"Nobody had counted the {i} windows of that grey old house." for i in range(80))


@pytest.fixture(scope="module")
def place(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the models one and two, an artifact that was calibrated on a.txt, and b.txt.

    A manifest with the text's sketch is enough for the leak check.
    """
    root = tmp_path_factory.mktemp("place")
    for name, seed in (("one", 0), ("two", 1), ("artifact", 0)):
        shutil.copytree(tiny_model("llama", seed=seed), root / name)
    manifest = {"calibration": {"origin": "a.txt", "sketch": encode_sketch(build_sketch([TEXT]))}}
    (root / "artifact" / "cptq.json").write_text(json.dumps(manifest))
    (root / "a.txt").write_text(TEXT)
    (root / "b.txt").write_text(OTHER)
    return root
