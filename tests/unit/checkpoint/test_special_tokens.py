"""The BOS is what a tokenizer adds, whatever it calls its tokens."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import processors

from cptq.checkpoint.special_tokens import find_bos
from tests.tiny_models import tiny_tokenizer


def adding(template: str) -> Any:
    tokenizer = tiny_tokenizer(causal=True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("<s> $A", 1),
        ("<s> $A </s>", 1),
        ("</s> $A", 2),  # as OPT's
        ("$A", None),
        ("$A </s>", None),
        ("<s> </s> $A", None),
    ],
)
def test_the_bos_is_the_one_token_before_a_text(template: str, expected: int | None) -> None:
    assert find_bos(adding(template)) == expected


def test_a_named_bos_is_not_one_that_is_added() -> None:
    tokenizer = tiny_tokenizer(causal=True)
    assert tokenizer.bos_token_id == 1
    assert find_bos(tokenizer) is None
    assert find_bos(tiny_tokenizer(causal=True, bos=True)) == 1
