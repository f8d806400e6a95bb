from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cptq.evaluation import perplexity as room
from cptq.evaluation.perplexity import (
    Estimate,
    Tokens,
    convert_to_bits,
    count_words_and_bytes,
    cut_windows,
    estimate_ratio,
    exponentiate,
    measure_nll,
    tokenize,
)
from cptq.evaluation.split_model import Chunk
from tests.reference.perplexity import naive_nll, naive_perplexity
from tests.tiny_models import EXACT_ARCHITECTURES, SENTENCES, tiny_tokenizer

TEXT = " ".join(SENTENCES)
CPU = torch.device("cpu")


def counts_per_window(tokens: Tokens, windows: int, seqlen: int):
    first_N = np.arange(windows) * seqlen
    return count_words_and_bytes(tokens, first_N, first_N + seqlen - 1)


def measured(module: nn.Module, ids: Tensor, seqlen: int, batch_size: int = 3) -> list[float]:
    windows_NT = cut_windows(ids, seqlen)
    return measure_nll(module, windows_NT, batch_size=batch_size, device=CPU).tolist()


@pytest.mark.parametrize("arch", EXACT_ARCHITECTURES)
def test_nll_equals_the_naive_one(load, arch: str) -> None:
    model = load(arch)
    ids = tokenize(model.tokenizer, TEXT).ids
    expected = naive_nll(model.module, ids.tolist(), 29)
    assert len(expected) == ids.numel() // 29 > 2
    assert measured(model.module, ids, 29) == pytest.approx(expected, rel=1e-6)


def test_a_trained_model_on_a_story_equals_the_naive_one(load, stories: Path) -> None:
    model = load(stories)
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside. " * 9
    ids = tokenize(model.tokenizer, story).ids
    nll_N = np.array(measured(model.module, ids, 61))
    value = exponentiate(estimate_ratio(nll_N, np.full(len(nll_N), 60))).value
    assert value == pytest.approx(naive_perplexity(model.module, ids.tolist(), 61), rel=1e-6)
    assert value < 10  # it knows stories: half its tokens are guessed


@pytest.mark.parametrize("seqlen", [2, 7, 64])
def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(load, seqlen: int) -> None:
    model = load("llama", tied=False)
    nn.init.zeros_(model.module.lm_head.weight)
    nll_N = np.array(measured(model.module, torch.arange(130), seqlen))
    estimate = exponentiate(estimate_ratio(nll_N, np.full(len(nll_N), seqlen - 1)))
    assert estimate.value == pytest.approx(model.config.vocab_size, rel=1e-6)
    assert estimate.stderr == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_the_batch_size_changes_nothing(load, batch_size: int) -> None:
    model = load("opt")
    ids = tokenize(model.tokenizer, TEXT).ids
    alone = measured(model.module, ids, 17, 1)
    assert measured(model.module, ids, 17, batch_size) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("elements", [1, 1000, 2**25])
def test_logits_in_pieces_change_nothing(
    load, monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    model = load("qwen3")
    ids = tokenize(model.tokenizer, TEXT).ids
    whole = measured(model.module, ids, 23)
    monkeypatch.setattr(room, "LOGIT_ELEMENTS", elements)
    assert measured(model.module, ids, 23) == pytest.approx(whole, rel=1e-6)


def test_a_model_that_scales_its_logits_is_scored_by_its_own_logits(load) -> None:
    model = load("llama")

    def scale(module: nn.Module, inputs: object, output):
        output.logits = output.logits * 0.5
        return output

    model.module.register_forward_hook(scale)
    ids = tokenize(model.tokenizer, TEXT).ids
    expected = naive_nll(model.module, ids.tolist(), 31)
    assert measured(model.module, ids, 31) == pytest.approx(expected, rel=1e-6)


def test_only_full_windows_are_taken() -> None:
    assert cut_windows(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut_windows(torch.arange(3), 4).shape == (0, 4)


def test_nll_by_hand() -> None:
    logits_BTV = torch.tensor([[[0.0, 0.0], [math.log(3), 0.0]]])
    labels_BT = torch.tensor([[1, 0]])
    expected = math.log(2) - math.log(3 / 4)
    chunk = Chunk(
        head=torch.nn.Identity(),
        rows=slice(3, 4),
        positions=slice(1, 3),
        hidden_BTC=logits_BTV,
        labels_BT=labels_BT,
    )
    assert float(chunk.compute_nll().sum()) == pytest.approx(expected)


@pytest.mark.parametrize("text", [TEXT, "  caf\u00e9 \u4f60\u597d\n\n\U0001f600 end "])
@pytest.mark.parametrize("seqlen", [2, 5])
def test_words_and_bytes_are_those_of_the_predicted_tokens(text: str, seqlen: int) -> None:
    tokens = tokenize(tiny_tokenizer(causal=True), text)
    assert tokens.ends is not None
    windows = tokens.ids.numel() // seqlen
    counts = counts_per_window(tokens, windows, seqlen)
    assert counts is not None
    for w, (words, size) in enumerate(zip(*counts, strict=True)):
        begin, end = tokens.ends[w * seqlen], tokens.ends[(w + 1) * seqlen - 1]
        assert size == len(text[begin:end].encode())
        ends_of_words = [
            i
            for i in range(begin, end)
            if not text[i].isspace() and (i + 1 == len(text) or text[i + 1].isspace())
        ]
        assert words == len(ends_of_words)


def test_one_window_over_all_counts_all_words_but_those_of_its_first_token() -> None:
    tokens = tokenize(tiny_tokenizer(causal=True), "a model is a function")
    counts = counts_per_window(tokens, 1, tokens.ids.numel())
    assert counts is not None
    assert (counts[0].tolist(), counts[1].tolist()) == ([4], [len("a model is a function") - 1])


def test_the_ratio_and_its_error_by_hand() -> None:
    nll_N = np.array([4.0, 8.0, 6.0])
    estimate = estimate_ratio(nll_N, np.array([2, 2, 2]))
    assert estimate.value == 3.0
    assert estimate.stderr == pytest.approx(np.std(nll_N / 2, ddof=1) / math.sqrt(3))
    assert estimate_ratio(nll_N[:1], np.array([2])) == Estimate(value=2.0, stderr=None)


def test_exponentials_and_bits() -> None:
    found = exponentiate(Estimate(value=math.log(20), stderr=0.1))
    assert (found.value, found.stderr) == (pytest.approx(20), pytest.approx(2.0))
    assert exponentiate(Estimate(value=1e5, stderr=1.0)) == Estimate(value=math.inf, stderr=None)
    found = convert_to_bits(Estimate(value=math.log(8), stderr=math.log(2)))
    assert (found.value, found.stderr) == (pytest.approx(3), pytest.approx(1))
