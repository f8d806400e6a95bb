from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cptq.config import EvalSettings, ModelSettings
from cptq.evaluation import split_model
from cptq.evaluation.divergence import StateComparer, StateRecorder, estimate_quantile
from cptq.evaluation.task import EvalOptions, evaluate
from cptq.pipeline import evaluate as run
from tests.reference.likelihood import log_probabilities, naive_kl
from tests.reference.quantiles import bootstrap_quantile_error, naive_quantile
from tests.tiny_models import tiny_tokenizer


def compared(base, model, file: str, folder: Path, emit, **options):
    recorder = StateRecorder(folder=folder)
    given = EvalOptions(seqlen=24, batch_size=2, **options)
    evaluate(base, file, replace(given, observer=recorder), emit)
    comparer = StateComparer(recorded=recorder.recorded)
    found = evaluate(model, file, replace(given, observer=comparer), emit)
    return {result.metric: result for result in found}


def shaken(model, amount: float = 0.3):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.module.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * weight.std() * amount)
    return model


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt"])
def test_kl_agreement_and_flips_equal_the_naive_ones(
    load, heard, tmp_path: Path, file: str, arch: str
) -> None:
    base, model = load(arch), shaken(load(arch))
    found = compared(base, model, file, tmp_path, heard, limit=10)
    ids = base.tokenizer(Path(file).read_text())["input_ids"]
    windows = [ids[i : i + 24] for i in range(0, 10 * 24, 24)]
    kl = [value for row in windows for value in naive_kl(base.module, model.module, row)]
    assert len(kl) == found["kl"].tokens
    assert found["kl"].value == pytest.approx(np.mean(kl), rel=1e-4)
    assert found["kl_p99"].value == pytest.approx(np.quantile(kl, 0.99), rel=1e-4)
    assert found["kl_p99.9"].value == pytest.approx(np.quantile(kl, 0.999), rel=1e-4)
    same, flips = [], []
    for row in windows:
        two = [log_probabilities(m.module, row) for m in (base, model)]
        for own, other, label in zip(*two, row[1:], strict=False):
            tops = [values.index(max(values)) for values in (own, other)]
            same.append(tops[0] == tops[1])
            flips.append((tops[0] == label) != (tops[1] == label))
    assert found["top1_agree"].value == pytest.approx(np.mean(same))
    assert found["flips"].value == pytest.approx(np.mean(flips))
    per_window = np.array(kl).reshape(len(windows), -1).mean(1)
    assert found["kl"].stderr == pytest.approx(
        per_window.std(ddof=1) / np.sqrt(len(windows)), rel=1e-4
    )
    assert found["kl"].per_sample.value == pytest.approx(found["kl"].value)
    assert (found["kl"].higher_is_better, found["top1_agree"].higher_is_better) == (False, True)


def test_a_model_beside_itself_has_no_divergence(load, heard, tmp_path: Path, file: str) -> None:
    found = compared(load("llama"), load("llama"), file, tmp_path, heard)
    assert (found["kl"].value, found["kl_p99"].stderr, found["flips"].value) == (0, 0, 0)
    assert found["top1_agree"].value == 1


@pytest.mark.parametrize("vocabulary", [300, 310], ids=["compared", "not compared"])
def test_the_baselines_own_perplexity_comes_with_the_comparison(
    load, heard, tmp_path: Path, file: str, vocabulary: int
) -> None:
    given = EvalOptions(seqlen=24, batch_size=2)
    base, model = load("llama"), load("llama", vocab_size=vocabulary)
    recorder = StateRecorder(folder=tmp_path)
    assert evaluate(base, file, replace(given, observer=recorder), heard) == []
    evaluate(model, file, replace(given, observer=StateComparer(recorded=recorder.recorded)), heard)
    alone = evaluate(base, file, given, heard)
    for late, result in zip(recorder.finish(), alone, strict=True):
        assert (late.metric, late.unit, late.samples) == (
            result.metric,
            result.unit,
            result.samples,
        )
        assert late.value == pytest.approx(result.value, rel=1e-12)
        assert late.stderr == pytest.approx(result.stderr, rel=1e-9)


def test_chunks_and_models_that_cannot_be_split_change_nothing(
    load, heard, tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, model = load("llama"), shaken(load("llama"))
    whole = compared(base, model, file, tmp_path, heard)
    monkeypatch.setattr("cptq.evaluation.perplexity.LOGIT_ELEMENTS", 1)
    monkeypatch.setattr(split_model, "_find_head", lambda module: None)
    again = compared(base, model, file, tmp_path, heard)
    for metric, result in whole.items():
        assert again[metric].value == pytest.approx(result.value, rel=1e-5)


def test_other_tokens_are_not_compared(load, heard, tmp_path: Path, file: str) -> None:
    class Backwards:
        is_fast, bos_token_id = False, 1

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": base.tokenizer(text)["input_ids"][::-1]}

    base = load("llama")
    model = replace(load("llama"), tokenizer=Backwards())
    found = compared(base, model, file, tmp_path, heard)
    assert list(found) == ["perplexity"]
    assert any("tokens" in message for message in heard.notices)


def test_other_vocabularies_are_not_compared(load, heard, tmp_path: Path, file: str) -> None:
    found = compared(load("llama"), load("llama", vocab_size=310), file, tmp_path, heard)
    assert "kl" not in found
    assert any("310 and 300" in message for message in heard.notices)


def test_without_room_on_the_disk_nothing_is_compared(
    load, heard, tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    found = compared(load("llama"), load("llama"), file, tmp_path, heard)
    assert "kl" not in found
    assert any("1,000 are free" in message for message in heard.notices)


def test_with_a_stride_that_is_said(load, heard, tmp_path: Path, file: str) -> None:
    found = compared(load("llama"), load("llama"), file, tmp_path, heard, stride=7)
    assert "kl" not in found
    assert any("--stride" in message for message in heard.notices)


def test_eval_with_a_baseline_reports_it(tiny_model, heard, file: str, tmp_path: Path) -> None:
    settings = EvalSettings(
        model=ModelSettings(model=str(tiny_model("llama", seed=1)), device="cpu"),
        baseline=str(tiny_model("llama")),
        tasks=(file,),
        seqlen=24,
        out=tmp_path / "eval.json",
    )
    summary = run(settings, heard).summary
    metrics = [result.metric for result in summary.evaluation]
    assert metrics[3:] == ["kl", "kl_p99", "kl_p99.9", "top1_agree", "flips"]
    assert [result.metric for result in summary.baseline] == metrics[:3]


def drawn(windows: int, tokens: int, spread: float, seed: int) -> np.ndarray:
    """Heavy tails, as KL has, each window with a level of its own."""
    generator = np.random.default_rng(seed)
    level_N = np.exp(spread * generator.normal(size=(windows, 1)))
    return level_N * generator.exponential(size=(windows, tokens)) ** 2


@pytest.mark.parametrize(("level", "spread"), [(0.5, 0.7), (0.9, 0.0), (0.9, 0.7)])
def test_the_error_is_that_of_the_bootstrap_over_windows(level: float, spread: float) -> None:
    values_NT = drawn(61, 37, spread, 1)
    found = estimate_quantile(values_NT, level)
    assert found.value == pytest.approx(naive_quantile(values_NT.ravel().tolist(), level))
    slow = bootstrap_quantile_error(values_NT.tolist(), level, 300, 0)
    assert found.stderr == pytest.approx(slow, rel=0.25)


@pytest.mark.parametrize(("windows", "level"), [(80, 0.99), (200, 0.999)])
def test_the_error_is_the_spread_over_texts(windows: int, level: float) -> None:
    """Not of resamples: of new texts, windows and all."""
    estimates = [estimate_quantile(drawn(windows, 50, 0.5, seed), level) for seed in range(300)]
    truth = np.std([found.value for found in estimates])
    assert np.mean([found.stderr for found in estimates]) == pytest.approx(truth, rel=0.2)


def test_windows_that_are_alike_count_once() -> None:
    """The same tokens in ten copies within each window tell no more."""
    once = drawn(61, 37, 0.5, 3)
    assert estimate_quantile(np.repeat(once, 10, 1), 0.9).stderr == pytest.approx(
        estimate_quantile(once, 0.9).stderr, rel=0.05
    )


def test_too_few_windows_have_no_error() -> None:
    assert estimate_quantile(drawn(1, 50, 0.0, 0), 0.9).stderr is None
    assert estimate_quantile(drawn(3, 50, 0.0, 0), 0.999).stderr is None
    nothing = estimate_quantile(np.zeros((4, 7)), 0.99)
    assert (nothing.value, nothing.stderr) == (0.0, 0.0)


def test_kl_is_measured_on_the_windows_of_perplexity(load, heard, tmp_path: Path, file) -> None:
    """Each with the BOS that the tokenizer adds; with --bos first, the first alone."""
    tokenizer = tiny_tokenizer(causal=True, bos=True)
    base = replace(load("llama"), tokenizer=tokenizer)
    model = replace(shaken(load("llama")), tokenizer=tokenizer)
    bos, *ids = tokenizer(Path(file).read_text())["input_ids"]
    every = [[bos, *ids[i : i + 23]] for i in range(0, len(ids) - 22, 23)]
    first = [[bos, *ids][i : i + 24] for i in range(0, len(ids) - 22, 24)]
    for protocol, windows in (("every", every), ("first", first)):
        found = compared(base, model, file, tmp_path, heard, bos=protocol)
        kl = [value for row in windows for value in naive_kl(base.module, model.module, row)]
        assert found["kl"].tokens == len(kl)
        assert found["kl"].value == pytest.approx(np.mean(kl), rel=1e-4)
        assert found["kl"].protocol == found["perplexity"].protocol
