from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from torch import nn

from cptq.data.corpora import detokenize
from cptq.errors import EvaluationError
from cptq.evaluation.continuations import roll_windows
from cptq.evaluation.perplexity import tokenize
from cptq.evaluation.task import EvalOptions, evaluate
from tests.reference.likelihood import naive_rolling, naive_score
from tests.tiny_models import SENTENCES
from tests.unit.evaluation.task_data import PAGES, write_pages


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_pages(tmp_path)


@pytest.mark.parametrize(("length", "stride"), [(4, 4), (4, 1), (5, 2), (20, 3), (1, 1)])
@pytest.mark.parametrize("count", [1, 4, 11])
def test_every_token_is_predicted_once_with_its_context(
    length: int, stride: int, count: int
) -> None:
    ids = list(range(100, 100 + count))
    windows = roll_windows(ids, 1, length, stride)
    assert [token for w in windows for token in w.continuation] == ids
    whole = (1, *ids)
    for window in windows:
        fed = (window.context + window.continuation)[:-1]
        assert len(fed) <= length
        first = whole.index(window.continuation[0])
        assert whole[first - len(window.context) : first] == window.context
    for window in windows[1:]:
        assert len((window.context + window.continuation)[:-1]) == length
        assert len(window.context) >= length - stride + 1


def test_windows_as_the_documentation_of_the_harness_draws_them() -> None:
    windows = roll_windows([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], -1, 4, 4)
    assert [(w.context, w.continuation) for w in windows] == [
        ((-1,), (0, 1, 2, 3)),
        ((3,), (4, 5, 6, 7)),
        ((5, 6, 7), (8, 9)),
    ]


@pytest.mark.parametrize("stride", [31, 8])
def test_wikitext_rolling_equals_the_naive_sums(load, heard, data: Path, stride: int) -> None:
    model = load("llama")
    options = EvalOptions(data_dir=data, seqlen=31, stride=stride, batch_size=2)
    word, byte, token = evaluate(model, "wikitext-rolling", options, heard)
    pages = [PAGES[: PAGES.index(" = Numbers")].removesuffix("\n"), PAGES[PAGES.index(" = N") :]]
    pages[0] = pages[0].removeprefix(" \n")
    ids = [model.tokenizer(detokenize(page))["input_ids"] for page in pages]
    nll = -sum(naive_rolling(model.module, row, 1, 31, stride) for row in ids)
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    assert word.value == pytest.approx(math.exp(nll / words), rel=1e-6)
    size = sum(len(page.encode()) for page in pages)
    assert byte.value == pytest.approx(nll / size / math.log(2), rel=1e-6)
    assert token.value == pytest.approx(math.exp(nll / sum(map(len, ids))), rel=1e-6)
    assert [r.metric for r in (word, byte, token)] == [
        "word_perplexity",
        "bits_per_byte",
        "perplexity",
    ]
    assert (word.samples, word.version, word.seqlen) == (2, 2, 31)
    assert word.per_sample.value == pytest.approx(word.value)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(load, heard, data: Path) -> None:
    model = load("llama", tied=False)
    nn.init.zeros_(model.module.lm_head.weight)
    found = evaluate(model, "wikitext-rolling", EvalOptions(data_dir=data), heard)
    assert found[2].value == pytest.approx(model.config.vocab_size, rel=1e-6)


def test_a_text_rolls_with_a_stride(load, heard, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(SENTENCES))
    model, name = load("gpt2"), str(tmp_path / "a.txt")
    first, *ids = tokenize(model.tokenizer, " ".join(SENTENCES)).ids.tolist()
    token, _, byte = evaluate(model, name, EvalOptions(seqlen=40, stride=9), heard)
    nll = -naive_rolling(model.module, ids, first, 40, 9)
    assert token.tokens == len(ids)
    assert token.value == pytest.approx(math.exp(nll / len(ids)), rel=1e-6)
    size = len(" ".join(SENTENCES)) - len(model.tokenizer.decode([first]))
    assert byte.value == pytest.approx(nll / size / math.log(2), rel=1e-6)
    windows = 1 + math.ceil((len(ids) - 40) / 9)
    assert token.protocol == f"rolling windows: {windows} of 40 tokens, stride 9, no BOS"
    assert token.samples == 1 + math.ceil((len(ids) - 40) / 9)
    # a limit takes the first windows: 40 tokens, then 9
    first_two = evaluate(model, name, EvalOptions(seqlen=40, stride=9, limit=2), heard)[0]
    assert first_two.tokens == 49


def test_a_stride_of_one_gives_every_token_all_the_context(load, heard, tmp_path: Path) -> None:
    text = SENTENCES[0][:40]
    (tmp_path / "a.txt").write_text(text)
    model = load("llama")
    options = EvalOptions(seqlen=200, stride=1)
    token = evaluate(model, str(tmp_path / "a.txt"), options, heard)[0]
    ids = model.tokenizer(text)["input_ids"]
    value, _ = naive_score(model.module, ids[:1], ids[1:], 256)
    assert token.value == pytest.approx(math.exp(-value / (len(ids) - 1)), rel=1e-6)


def test_a_stride_that_skips_tokens_is_refused(load, heard, data: Path) -> None:
    options = EvalOptions(data_dir=data, seqlen=16, stride=17)
    with pytest.raises(EvaluationError, match="--stride 17"):
        evaluate(load("llama"), "wikitext-rolling", options, heard)


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("a 1 @,@ 000 @.@ 5 well @-@ known", "a 1,000.5 well-known"),
        ("it , too ; so : no ! why ? end . x", "it, too; so: no! why? end. x"),
        ('( a ) [ b ] { c } " d "', '(a) [b] {c} "d"'),
        ("the dog 's tail", "the dog's tail"),
        (" = = = Deep = = = \n 20 \u00b0 C N", "=== Deep ===\n20\u00b0C N"),
    ],
)
def test_detokenize_takes_the_corpus_spacing_out(page: str, expected: str) -> None:
    assert detokenize(page).strip() == expected
