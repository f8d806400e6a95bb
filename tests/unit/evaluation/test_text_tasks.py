from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from cptq.calibration.tokens import digest_tokens
from cptq.errors import DataError, EvaluationError
from cptq.evaluation.task import EvalOptions, evaluate
from cptq.types import Progress
from tests.reference.perplexity import naive_nll
from tests.tiny_models import SENTENCES, tiny_tokenizer

TEXT = "\n".join(SENTENCES * 3)


def test_a_file_gives_three_numbers_of_one_nll(load, heard, file: str) -> None:
    model = load("llama")
    token, word, byte = evaluate(model, file, EvalOptions(seqlen=64), heard)
    ids = model.tokenizer(TEXT)["input_ids"]
    nll = sum(naive_nll(model.module, ids, 64))
    assert [r.metric for r in (token, word, byte)] == [
        "perplexity",
        "word_perplexity",
        "bits_per_byte",
    ]
    assert [r.unit for r in (token, word, byte)] == ["per token", "per word", "bits per byte"]
    assert token.tokens == token.samples * 63
    assert token.value == pytest.approx(math.exp(nll / token.tokens), rel=1e-6)
    # every byte but those of the first token of each window, and of the tail, is predicted
    scored = nll / (byte.value * math.log(2))
    assert 0.9 * len(TEXT) < scored < len(TEXT)
    words = nll / math.log(word.value)
    assert words == pytest.approx(round(words), abs=1e-3)
    assert words / scored == pytest.approx(len(TEXT.split()) / len(TEXT), rel=0.02)
    assert token.task == f"text:{file}"
    assert token.data_source == file
    assert all(r.stderr is not None and r.seqlen == 64 for r in (token, word, byte))
    assert all(r.per_sample.value == pytest.approx(r.value) for r in (token, word, byte))
    assert all(len(r.per_sample) == r.samples for r in (token, word, byte))


def test_seqlen_is_the_positions_of_a_small_model_and_that_is_said(load, heard, file: str) -> None:
    found = evaluate(load("llama"), file, EvalOptions(), heard)[0]
    assert found.seqlen == 256
    assert any("256" in message and "2048" in message for message in heard.notices)


def test_more_than_the_positions_is_refused(load, heard, file: str) -> None:
    with pytest.raises(EvaluationError, match="--seqlen 257") as caught:
        evaluate(load("llama"), file, EvalOptions(seqlen=257), heard)
    assert caught.value.allowed == "2 to 256"


def test_a_short_text_is_one_window_and_that_is_said(load, heard, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("The quick brown fox")
    model = load("gpt2")
    found = evaluate(model, str(tmp_path / "short.txt"), EvalOptions(seqlen=100), heard)
    assert found[0].seqlen == len(model.tokenizer("The quick brown fox")["input_ids"])
    assert found[0].stderr is None
    assert any(f"of {found[0].seqlen} tokens" in message for message in heard.notices)
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(DataError, match="1 tokens"):
        evaluate(model, str(tmp_path / "short.txt"), EvalOptions(), heard)


@pytest.mark.parametrize(("limit", "windows"), [(3, 3), (0.5, 5), (1, 10), (1000, 10), (1e-9, 1)])
def test_limit_counts_windows_or_a_share_of_them(
    load, heard, file: str, limit: float, windows: int
) -> None:
    model = load("llama")
    seqlen = len(model.tokenizer(TEXT)["input_ids"]) // 10
    found = evaluate(model, file, EvalOptions(seqlen=seqlen, limit=limit), heard)[0]
    assert found.samples == windows
    steps = [e for e in heard if isinstance(e, Progress)]
    assert (steps[-1].done, steps[-1].total) == (windows, windows)


def test_outputs_that_are_not_finite_are_refused(load, heard, file: str) -> None:
    model = load("llama", tied=False)
    nn.init.constant_(model.module.lm_head.weight, math.nan)
    with pytest.raises(EvaluationError, match="not finite"):
        evaluate(model, file, EvalOptions(), heard)


def test_a_model_without_a_tokenizer_is_refused(load, heard, file: str) -> None:
    with pytest.raises(EvaluationError, match="tokenizer"):
        evaluate(replace(load("llama"), tokenizer=None), file, EvalOptions(), heard)


def test_a_tokenizer_without_offsets_skips_words_and_bytes(load, heard, file: str) -> None:
    model = load("llama")

    class Slow:
        is_fast = False

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": model.tokenizer(text)["input_ids"]}

    found = evaluate(replace(model, tokenizer=Slow()), file, EvalOptions(), heard)
    assert [result.metric for result in found] == ["perplexity"]
    assert any("word perplexity" in message for message in heard.notices)


def test_wikitext_is_never_replaced_by_another_text(
    load, heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="WikiText-2"):
        evaluate(load("llama"), "wikitext", EvalOptions(data_dir=tmp_path), heard)


def test_pydoc_needs_nothing(load, heard) -> None:
    found = evaluate(load("llama"), "pydoc", EvalOptions(limit=2, seqlen=32), heard)
    assert found[0].data_source is not None
    assert found[0].data_source.startswith("pydoc_data.topics of CPython")


@pytest.mark.parametrize(
    ("bos", "expected"),
    [("every", 124.8459), pytest.param("first", 119.5188, marks=pytest.mark.slow)],
)
def test_stories260k_on_wikitext(
    load, heard, stories: Path, data_dir: Path, bos: str, expected: float
) -> None:
    """A number to notice when the text or the protocol changes: first four windows of 512."""
    options = EvalOptions(limit=4, data_dir=data_dir, bos=bos)
    found = evaluate(load(stories), "wikitext", options, heard)[0]
    assert (found.seqlen, found.samples, found.tokens) == (512, 4, 2044)
    assert found.value == pytest.approx(expected, rel=1e-5)


def with_bos(model):
    return replace(model, tokenizer=tiny_tokenizer(causal=True, bos=True))


def test_every_window_begins_with_the_bos_that_is_never_predicted(load, heard, file: str) -> None:
    model = with_bos(load("llama"))
    token, word, byte = evaluate(model, file, EvalOptions(seqlen=64), heard)
    bos, *ids = model.tokenizer(TEXT)["input_ids"]
    windows = [[bos, *ids[i : i + 63]] for i in range(0, len(ids) - 62, 63)]
    nll = sum(sum(naive_nll(model.module, window, 64)) for window in windows)
    assert (token.samples, token.tokens) == (len(windows), 63 * len(windows))
    assert token.value == pytest.approx(math.exp(nll / token.tokens), rel=1e-6)
    assert token.data_fingerprint == digest_tokens(map(torch.tensor, windows))
    # the text up to the last window's end is predicted whole: all its bytes and words count
    covered = model.tokenizer.decode(ids[: token.tokens])
    assert byte.value == pytest.approx(nll / len(covered.encode()) / math.log(2), rel=1e-6)
    words = nll / math.log(word.value)
    assert words == pytest.approx(round(words), abs=1e-3)
    assert len(covered.split()) - 1 <= round(words) <= len(covered.split())
    assert {r.protocol for r in (token, word, byte)} == {
        f"windows: {len(windows)} of 64 tokens, BOS in each"
    }


def test_the_gptq_protocol_has_a_bos_in_the_first_window_only(load, heard, file: str) -> None:
    model = with_bos(load("llama"))
    found = evaluate(model, file, EvalOptions(seqlen=64, bos="first"), heard)[0]
    nll_N = naive_nll(model.module, model.tokenizer(TEXT)["input_ids"], 64)
    assert found.value == pytest.approx(math.exp(sum(nll_N) / 63 / len(nll_N)), rel=1e-6)
    assert found.protocol == f"windows: {len(nll_N)} of 64 tokens, BOS in the first only"
    assert not heard.notices


def test_without_a_bos_the_protocols_are_one_and_that_is_said(load, heard, file: str) -> None:
    model = load("llama")
    every = evaluate(model, file, EvalOptions(seqlen=64), heard)
    assert not heard.notices
    first = evaluate(model, file, EvalOptions(seqlen=64, bos="first"), heard)
    assert heard.notices == ["the tokenizer adds no BOS, so --bos first changes nothing"]
    assert [replace(r, seconds=0) for r in first] == [replace(r, seconds=0) for r in every]
    assert every[0].protocol == f"windows: {every[0].samples} of 64 tokens, no BOS"


@pytest.mark.parametrize("stride", [9, 40])
def test_rolling_windows_begin_with_the_bos_too(load, heard, file: str, stride: int) -> None:
    model = with_bos(load("gpt2"))
    found = evaluate(model, file, EvalOptions(seqlen=40, stride=stride), heard)[0]
    bos, *ids = model.tokenizer(TEXT)["input_ids"]
    nll, done = 0.0, 0
    while done < len(ids):  # 40 tokens are fed, the BOS among them, and the last is not
        end = min(done + (stride if done else 40), len(ids))
        fed = [bos, *ids[max(0, end - 40) : end]]
        with torch.no_grad():
            logits = model.module(input_ids=torch.tensor([fed[:-1]])).logits[0].double()
        nll -= sum(
            float(logits[place - 1].log_softmax(-1)[fed[place]])
            for place in range(len(fed) - (end - done), len(fed))
        )
        done = end
    assert found.tokens == len(ids)
    assert found.value == pytest.approx(math.exp(nll / len(ids)), rel=1e-5)
    assert found.protocol == (
        f"rolling windows: {found.samples} of 40 tokens, stride {stride}, BOS in each"
    )


def test_a_text_shorter_than_a_window_keeps_its_bos(load, heard, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("The quick brown fox")
    model = with_bos(load("llama"))
    found = evaluate(model, str(tmp_path / "short.txt"), EvalOptions(seqlen=100), heard)[0]
    ids = model.tokenizer("The quick brown fox")["input_ids"]
    assert (found.samples, found.tokens) == (1, len(ids) - 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "expected"), [("SMOLLM2", 19.92), ("SMOLLM2_DITHERED", 26.94)]
)
def test_smollm2_has_its_known_perplexity(
    load, heard, data_dir: Path, variable: str, expected: float
) -> None:
    """First 20,480 tokens of the test part, windows of 2,048, no BOS."""
    directory = os.environ.get(f"CPTQ_{variable}")
    if not directory:
        pytest.skip(f"CPTQ_{variable} names no directory of smollm2-135m")
    options = EvalOptions(limit=10, data_dir=data_dir)
    found = evaluate(load(Path(directory)), "wikitext", options, heard)[0]
    assert (found.samples, found.seqlen) == (10, 2048)
    assert found.value == pytest.approx(expected, abs=0.005)
