from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cptq.errors import EvaluationError
from cptq.evaluation.sentences import encode_sentences, pad, run_batches
from tests.tiny_models import SENTENCES

MIXED = [(s[: 5 + 17 * i],) for i, s in enumerate(SENTENCES)] + [("a",), (SENTENCES[0],), ("",)]


def outputs(model, batch_size: int, heard, sentences=MIXED) -> torch.Tensor:
    encoded = encode_sentences(model, sentences, None, "task", heard)

    def first(batch):
        return model.module(**batch)[0].flatten(1)[:, :2]

    return run_batches(model, encoded, first, batch_size=batch_size, name="task", emit=heard)


@pytest.mark.parametrize("arch", ["bert", "distilbert", "roberta", "mpnet"])
def test_neither_batch_size_nor_padding_side_changes_an_output(load, heard, arch: str) -> None:
    model = load(arch)
    alone = torch.stack([outputs(model, 1, heard, [row])[0] for row in MIXED])
    for side in ("left", "right"):
        model.tokenizer.padding_side = side
        for batch_size in (1, 3, 100):
            torch.testing.assert_close(outputs(model, batch_size, heard), alone, rtol=0, atol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 1e-3  # the outputs do differ between sentences


def test_the_tokenizers_saved_padding_is_not_used(load, heard) -> None:
    model = load("bert")
    plain = outputs(model, 3, heard)
    model.tokenizer.backend_tokenizer.enable_padding(length=50)
    model.tokenizer.backend_tokenizer.enable_truncation(4)
    torch.testing.assert_close(outputs(model, 3, heard), plain, rtol=0, atol=0)


def test_pairs_are_given_together(load, heard) -> None:
    model = load("bert")
    encoded = encode_sentences(model, [("a", "b"), ("c", "d e")], None, "task", heard)
    assert [row["input_ids"] for row in encoded.rows] == [
        model.tokenizer("a", "b")["input_ids"],
        model.tokenizer("c", "d e")["input_ids"],
    ]
    assert encoded.tokens == sum(len(row["input_ids"]) for row in encoded.rows)


def test_truncation_keeps_the_special_tokens_and_is_counted(load, heard) -> None:
    model = load("bert")
    encoded = encode_sentences(model, MIXED, 6, "task", heard)
    full = encode_sentences(model, MIXED, None, "task", heard)
    long = [i for i, row in enumerate(full.rows) if len(row["input_ids"]) > 6]
    assert 1 < len(long) < len(MIXED)
    assert encoded.truncated == len(long)
    assert len(heard.notices) == 1
    assert f"{len(long)} of {len(MIXED)}" in heard.notices[0]
    for i, row in enumerate(encoded.rows):
        ids = full.rows[i]["input_ids"]
        assert row["input_ids"] == (ids[:5] + ids[-1:] if i in long else ids)


def test_the_limit_is_the_smaller_of_tokenizer_and_positions(load, heard) -> None:
    model = load("bert")  # 256 positions, tokenizer 248
    assert encode_sentences(model, MIXED, None, "task", heard).max_length == 248
    assert encode_sentences(model, MIXED, 256, "task", heard).max_length == 256
    with pytest.raises(EvaluationError, match="257 tokens"):
        encode_sentences(model, MIXED, 257, "task", heard)


def test_padding_is_on_the_right_and_masked() -> None:
    rows = [
        {"input_ids": [5, 6], "attention_mask": [1, 1]},
        {"input_ids": [7], "attention_mask": [1]},
    ]
    batch = pad(rows, 9)
    assert batch["input_ids"].tolist() == [[5, 6], [7, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_without_a_padding_token_sentences_go_one_by_one(load, heard) -> None:
    model = load("bert")
    expected = outputs(model, 1, heard)
    encoded = replace(encode_sentences(model, MIXED, None, "task", heard), pad_id=None)
    sizes = []

    def first(batch):
        sizes.append(len(batch["input_ids"]))
        return model.module(**batch)[0]

    found = run_batches(model, encoded, first, batch_size=4, name="task", emit=heard)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert set(sizes) == {1}
    assert any("padding token" in message for message in heard.notices)


def test_outputs_that_are_not_finite_are_refused(load, heard) -> None:
    model = load("bert")
    model.module.classifier.bias.data[0] = float("inf")
    with pytest.raises(EvaluationError, match="not finite"):
        outputs(model, 2, heard)
