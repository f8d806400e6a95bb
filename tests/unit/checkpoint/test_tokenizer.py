"""A tokenizer beside its model: a missing BOS is told, ids beyond the embedding are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cptq.checkpoint.loader import read_spec
from cptq.checkpoint.tokenizer import check_token_ids, report_missing_bos
from cptq.config import ModelSettings
from cptq.errors import ModelError
from cptq.pipeline.generate import encode_prompt
from tests.conftest import Heard, TinyModel
from tests.tiny_models import tiny_tokenizer
from tests.unit.checkpoint.made import copied


@pytest.mark.parametrize(
    ("family", "bos", "told"),
    [("gemma3_text", False, 1), ("gemma", True, 0), ("llama", False, 0), ("qwen2", False, 0)],
)
def test_a_missing_bos_of_a_family_that_needs_one_is_told(
    family: str, bos: bool, told: int, heard: Heard
) -> None:
    report_missing_bos(family, tiny_tokenizer(causal=True, bos=bos), heard)
    assert len(heard.notices) == told
    assert all("adds no BOS" in notice and "<s>" in notice for notice in heard.notices)


def test_ids_beyond_the_embedding_are_refused_by_token(
    tiny_model: TinyModel, tmp_path: Path, heard: Heard
) -> None:
    path = copied(tiny_model("llama"), tmp_path / "model")
    tokenizer = tiny_tokenizer(causal=True)
    tokenizer.add_tokens(["girl"])
    tokenizer.save_pretrained(path)
    spec = read_spec(ModelSettings(model=str(path)), heard)
    assert encode_prompt(spec, "The quick fox", chat=False)
    check_token_ids(spec, [[], [299], torch.tensor([0, 299])])
    with pytest.raises(ModelError, match=r"id 300 \('girl'\).*ids 0 to 299"):
        encode_prompt(spec, "a little girl", chat=False)
