from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cptq.errors import EvaluationError
from cptq.evaluation import continuations as room
from cptq.evaluation.continuations import (
    Encoder,
    Request,
    batch_requests,
    choose_length,
    score_requests,
)
from tests.reference.likelihood import naive_score
from tests.tiny_models import EXACT_ARCHITECTURES

REQUESTS = [
    Request(context=(1, 9, 30), continuation=(7, 8)),
    Request(context=(5,), continuation=(6,)),
    Request(context=(1, 9, 30), continuation=(9,)),
    Request(context=(1, 9, 30), continuation=(7,)),
    Request(context=(1, 9), continuation=(30, 7, 8, 250, 3, 3)),
    Request(context=tuple(range(20, 60)), continuation=(11, 12, 13)),
]


def scored(model, requests=REQUESTS, length=256, batch_size=3, emit=lambda event: None):
    asked = batch_requests(requests, length=length, name="a task", emit=emit)
    found = score_requests(model, asked, batch_size=batch_size, name="a task", emit=emit)
    return found.loglikelihood.tolist(), found.greedy.tolist()


@pytest.mark.parametrize("arch", EXACT_ARCHITECTURES)
def test_scores_equal_the_naive_ones(load, arch: str) -> None:
    model = load(arch)
    expected = [naive_score(model.module, r.context, r.continuation, 256) for r in REQUESTS]
    sums, greedy = scored(model)
    assert sums == pytest.approx([value for value, _ in expected], rel=1e-6)
    assert greedy == [right for _, right in expected]


def test_the_likeliest_continuation_is_greedy(load) -> None:
    model = load("llama")
    logits = model.module(input_ids=torch.tensor([[1, 9, 30]])).logits[0, -1]
    best, worst = int(logits.argmax()), int(logits.argmin())
    asked = [Request(context=(1, 9, 30), continuation=(t,)) for t in (best, worst)]
    sums, greedy = scored(model, asked)
    assert greedy == [True, False]
    assert sums[0] > sums[1]


@pytest.mark.parametrize("arch", ["opt", "gpt2", "llama"])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_batch_size_padding_side_and_padding_token_change_nothing(
    load, arch: str, batch_size: int
) -> None:
    model = load(arch)
    alone, _ = scored(model, batch_size=1)
    model.tokenizer.padding_side = "left"
    model.tokenizer.pad_token = None
    assert scored(model, batch_size=batch_size)[0] == pytest.approx(alone, abs=1e-5)


def test_rows_that_feed_the_same_tokens_are_fed_once(load, heard) -> None:
    scored(load("llama"), emit=heard)
    assert heard[-1].total == 5  # 9 and 7 are read from one forward


def test_pieces_change_nothing(load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("llama")
    whole, _ = scored(model)
    monkeypatch.setattr(room, "LOGIT_ELEMENTS", 1)
    monkeypatch.setattr(room, "FORWARD_TOKENS", 5)
    assert scored(model)[0] == pytest.approx(whole, rel=1e-6)


def test_a_long_context_is_cut_on_the_left_and_that_is_said(load, heard) -> None:
    model = load("llama")
    expected = [naive_score(model.module, r.context, r.continuation, 10) for r in REQUESTS]
    sums, _ = scored(model, length=10, emit=heard)
    assert sums == pytest.approx([value for value, _ in expected], rel=1e-6)
    assert len(heard.notices) == 1
    assert all(number in heard.notices[0] for number in ("1 of 6", "10 tokens"))


def test_an_answer_longer_than_the_model_takes_is_refused(load) -> None:
    with pytest.raises(EvaluationError, match="a task has 6 tokens"):
        scored(load("llama"), length=5)


def test_outputs_that_are_not_finite_are_refused(load) -> None:
    model = load("llama", tied=False)
    torch.nn.init.constant_(model.module.lm_head.weight, torch.nan)
    with pytest.raises(EvaluationError, match="not finite"):
        scored(model)


def test_context_and_continuation_are_tokenised_together(load) -> None:
    model = load("llama")
    encoder, ids = Encoder(model, "a task"), model.tokenizer("The quick brown fox")["input_ids"]
    request = encoder.build_request("The quick", " brown fox")
    assert request.context + request.continuation == tuple(ids)
    assert encoder.build_request("The quick ", "brown fox") == request  # the space goes along


def test_an_empty_context_is_the_prefix_token(load) -> None:
    model = load("llama")
    encoder = Encoder(model, "a task")
    plain = tuple(model.tokenizer("fox")["input_ids"])
    assert encoder.prefix == model.tokenizer.bos_token_id
    assert encoder.build_request("", "fox") == Request(
        context=(encoder.prefix,), continuation=plain
    )
    assert encoder.build_request("", "<s>fox") == encoder.build_request("", "fox")  # not twice


def test_a_tokenizer_that_adds_bos_does_so_once() -> None:
    class Adding:
        bos_token_id, eos_token_id = 1, 2

        def decode(self, ids: list[int]) -> str:
            return "<s>"

        def encode(self, text: str, add_special_tokens: bool = True, verbose: bool = True):
            bare = text.removeprefix("<s>")
            begins = add_special_tokens or bare != text
            return ([1] if begins else []) + [10 + len(word) for word in bare.split()]

    sizes = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=13))
    spec = SimpleNamespace(tokenizer=Adding(), source="m", config=sizes)
    encoder = Encoder(spec, "a task")
    assert encoder.encode("a bb") == encoder.encode("<s>a bb") == (1, 11, 12)
    assert encoder.build_request("a", " bb") == Request(context=(1, 11), continuation=(12,))


def test_what_no_tokenizer_can_do_is_refused(load) -> None:
    model = load("llama")
    with pytest.raises(EvaluationError, match="tokenizer"):
        Encoder(replace(model, tokenizer=None), "a task")
    with pytest.raises(EvaluationError, match="''"):
        Encoder(model, "a task").build_request("a", "")
    model.tokenizer.bos_token = model.tokenizer.eos_token = None
    with pytest.raises(EvaluationError, match="BOS"):
        Encoder(model, "a task")


def test_the_length_is_asked_or_the_models(load) -> None:
    model = load("llama")
    assert choose_length(model, None) == 256
    assert choose_length(model, 7) == 7
    with pytest.raises(EvaluationError, match="--seqlen 257"):
        choose_length(model, 257)
