from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cptq.config import EvalSettings, ModelSettings
from cptq.evaluation import halves as halves_room
from cptq.evaluation.divergence import Comparer, Keeper
from cptq.evaluation.flips import with_flips
from cptq.evaluation.options import EvalOptions
from cptq.evaluation.run import evaluate
from cptq.pipeline import evaluate as run
from cptq.types import EvalResult
from cptq.types.samples import build_pairs, build_ratios
from tests.reference.likelihood import log_probabilities, naive_kl
from tests.tiny_models import SENTENCES


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(SENTENCES))
    return str(path)


def compared(base, model, file: str, folder: Path, emit, **options):
    keeper = Keeper(folder=folder)
    given = EvalOptions(seqlen=24, batch_size=2, **options)
    evaluate(base, file, replace(given, beside=keeper), emit)
    comparer = Comparer(kept=keeper.kept)
    found = evaluate(model, file, replace(given, beside=comparer), emit)
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
    found = compared(base, model, file, tmp_path, heard)
    ids = base.tokenizer(Path(file).read_text())["input_ids"]
    windows = [ids[i : i + 24] for i in range(0, len(ids) - 23, 24)]
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


def test_pieces_and_undivided_models_change_nothing(
    load, heard, tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, model = load("llama"), shaken(load("llama"))
    whole = compared(base, model, file, tmp_path, heard)
    monkeypatch.setattr("cptq.evaluation.divergence.LOGIT_ELEMENTS", 1)
    monkeypatch.setattr(halves_room, "_head", lambda module: None)
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
    assert any("do not see the same tokens" in message for message in heard.notices)


def test_other_vocabularies_are_not_compared(load, heard, tmp_path: Path, file: str) -> None:
    found = compared(load("llama"), load("llama", vocab_size=310), file, tmp_path, heard)
    assert "kl" not in found
    assert any("vocabularies of 310 and 300 tokens" in message for message in heard.notices)


def test_without_room_on_the_disk_nothing_is_compared(
    load, heard, tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    found = compared(load("llama"), load("llama"), file, tmp_path, heard)
    assert "kl" not in found
    assert any("temporary disk, and 1,000 are free" in message for message in heard.notices)


def test_with_a_stride_that_is_said(load, heard, tmp_path: Path, file: str) -> None:
    found = compared(load("llama"), load("llama"), file, tmp_path, heard, stride=7)
    assert "kl" not in found
    assert any("without --stride" in message for message in heard.notices)


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


def answered(metric: str, per_sample, fingerprint: str = "f") -> EvalResult:
    return EvalResult(
        task="piqa",
        version=1,
        metric=metric,
        value=0.5,
        unit="of questions",
        higher_is_better=True,
        samples=4,
        seconds=1.0,
        data_fingerprint=fingerprint,
        per_sample=per_sample,
    )


def test_flips_by_hand() -> None:
    ours, theirs = (
        answered("acc", build_ratios([1, 0, 1, 0])),
        answered("acc", build_ratios([0, 1, 1, 0])),
    )
    acc, flips = with_flips([ours], [theirs])
    assert acc is ours
    assert (flips.metric, flips.value, flips.higher_is_better) == ("flips", 0.5, False)
    assert flips.stderr == pytest.approx(np.std([1, 1, 0, 0], ddof=1) / 2)
    classes = build_pairs([0, 1, 2, 1], [0, 1, 1, 0]), build_pairs([0, 1, 2, 1], [0, 0, 1, 1])
    flips = with_flips([answered("accuracy", classes[0])], [answered("accuracy", classes[1])])[1]
    assert flips.value == 0.5


def test_other_samples_have_no_flips() -> None:
    ours = answered("acc", build_ratios([1, 0]))
    for other in (answered("acc", build_ratios([1, 0]), "g"), answered("acc", None)):
        assert with_flips([ours], [other]) == (ours,)
