"""The bridge to lm-evaluation-harness: without it one sentence, with it the same numbers."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cptq.errors import CptqError, EvaluationError
from cptq.evaluation.harness import require_harness, resolve_tasks, run_harness
from cptq.evaluation.harness_results import _per_sample, _stderr, harness_results
from cptq.evaluation.options import EvalOptions
from cptq.types.samples import build_ratios

ANSWER = {
    "results": {
        "piqa": {
            "alias": "piqa",
            "acc,none": 0.5,
            "acc_stderr,none": 0.25,
            "word_perplexity,none": 12.0,
            "word_perplexity_stderr,none": "N/A",
            "exact_match,strict-match": 0.0,
        }
    },
    "versions": {"piqa": 1.0},
    "n-samples": {"piqa": {"original": 9, "effective": 2}},
    "higher_is_better": {"piqa": {"acc": True}},
    "samples": {"piqa": [{"doc_hash": "a", "acc": 1.0}, {"doc_hash": "b", "acc": 0.0}]},
}


def test_without_the_extra_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvaluationError, match="--lm-eval needs lm-evaluation-harness") as caught:
        require_harness()
    assert caught.value.hint == 'install it: pip install "cptq[lm-eval]"'


def test_the_harness_numbers_become_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cptq.evaluation.harness_results._release", lambda: "0.4.13")
    acc, word, exact = harness_results(ANSWER, 3.0)
    assert (acc.task, acc.metric, acc.value, acc.stderr) == ("lm-eval/piqa", "acc", 0.5, 0.25)
    assert (acc.version, acc.samples, acc.higher_is_better) == (1, 2, True)
    assert acc.per_sample == build_ratios([1, 0])
    assert acc.data_fingerprint is not None
    assert (word.unit, word.higher_is_better, word.stderr) == ("per word", False, None)
    assert exact.metric == "exact_match (strict-match)"


def test_samples_that_do_not_give_the_value_are_left_out() -> None:
    assert _per_sample([{"f1": 1.0}, {"f1": 0.0}], "f1", 0.7) is None
    assert _per_sample([{"f1": [0, 1]}], "f1", 1.0) is None
    assert _per_sample([], "f1", 1.0) is None


def test_summed_metrics_get_the_error_of_a_ratio_over_documents() -> None:
    samples = [{"bits_per_byte": [-30.0, 20]}, {"bits_per_byte": (-70.0, 40)}]
    parts = _per_sample(samples, "bits_per_byte", 100 / 60 / math.log(2))
    assert parts == build_ratios([30, 70], [20, 40], "bits")
    residuals = np.array([30 - 100 / 60 * 20, 70 - 100 / 60 * 40])
    by_hand = np.sqrt((residuals**2).sum() * 2 / 1) / 60 / math.log(2)
    assert _stderr("N/A", parts) == pytest.approx(by_hand)
    assert _stderr(0.5, parts) == 0.5
    assert _stderr("N/A", None) is None
    assert _per_sample(samples, "bits_per_byte", 1.0) is None


def test_a_file_that_is_no_task_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    file = tmp_path / "mine.yaml"
    for content, words in {b"x: 1": "names no task", b"caf\xe9": "is not UTF-8"}.items():
        file.write_bytes(content)
        with pytest.raises(CptqError, match=words):
            resolve_tasks((str(file),))
    with pytest.raises(EvaluationError, match="no file"):
        resolve_tasks((str(tmp_path / "none.yaml"),))


def test_a_classifier_is_refused(load, heard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cptq.evaluation.harness.require_harness", lambda: None)
    with pytest.raises(EvaluationError, match="--lm-eval is for a causal-lm"):
        run_harness(load("bert"), ["piqa"], EvalOptions(), heard)


@pytest.mark.slow
def test_cptq_and_the_harness_agree(repository: Path, stories: Path, data_dir: Path) -> None:
    """All tasks of scripts/check_harness on stories260k, to 1e-4."""
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    script = repository / "scripts" / "check_harness.py"
    words = [str(stories), "--data-dir", str(data_dir), "--questions", "20", "--sentences", "40"]
    done = subprocess.run(
        [sys.executable, str(script), *words, "--pages", "1"],
        cwd=repository,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("| 0.0e+00 |") >= 10
