"""A perplexity on the corpus that calibrated the model is marked; nothing else is."""

from __future__ import annotations

import pytest

from cptq.evaluation.in_domain import mark_in_domain
from cptq.evaluation.task import EvalOptions, evaluate
from cptq.types import EvalResult


def make(task: str, protocol: str | None = "windows: 2 of 8 tokens, no BOS") -> EvalResult:
    return EvalResult(
        task=task,
        version=2,
        metric="perplexity",
        value=3.0,
        unit="per token",
        higher_is_better=False,
        samples=2,
        seconds=0.0,
        protocol=protocol,
        notes=("before",),
    )


@pytest.mark.parametrize(
    ("task", "source", "expected"),
    [
        ("wikitext", "wikitext", True),
        ("wikitext103", "wiki.valid.tokens", True),
        ("wikitext-rolling", "wikitext", True),
        ("text:/data/wiki.test.raw", "wikitext", True),
        ("pydoc", "pydoc", True),
        ("text:/data/notes.txt", "notes.txt", True),
        ("wikitext", "pydoc", False),
        ("pydoc", "wikitext", False),
        ("ptb", "glue/sst2", False),
        ("wikitext", None, False),
    ],
)
def test_the_corpus_decides(task: str, source: str | None, expected: bool) -> None:
    (found,) = mark_in_domain([make(task)], source)
    assert found.in_domain is expected
    note = f"in-domain: the model was calibrated on {source}"
    assert found.notes == (("before", note) if expected else ("before",))
    assert EvalResult.from_dict({"value": 1.0, **_plain(found)}).in_domain is expected


def _plain(result: EvalResult) -> dict[str, object]:
    return {name: getattr(result, name) for name in result.__dataclass_fields__}


def test_only_text_is_marked() -> None:
    assert not mark_in_domain([make("glue/sst2", None)], "glue/sst2")[0].in_domain


def test_every_number_of_a_text_has_a_protocol(load, heard) -> None:
    found = evaluate(load("llama"), "pydoc", EvalOptions(limit=2, seqlen=32), heard)
    assert all(result.protocol for result in found)
    assert all(result.in_domain for result in mark_in_domain(found, "pydoc"))
