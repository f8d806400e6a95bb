"""The bridge to lm-evaluation-harness: without it one sentence, with it the same numbers."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cptq.errors import CptqError, EvaluationError
from cptq.evaluation.task import EvalOptions
from cptq.evaluation.tasks import harness
from cptq.evaluation.tasks.harness import (
    _choose_stderr,
    _read_samples,
    import_harness,
    prepare_harness,
    read_results,
    resolve_tasks,
)
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
    with pytest.raises(EvaluationError, match="--lm-eval") as caught:
        import_harness()
    assert 'pip install "cptq[lm-eval]"' in str(caught.value.hint)


def test_the_harness_numbers_become_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cptq.evaluation.tasks.harness._read_release", lambda: "0.4.13")
    acc, word, exact = read_results(ANSWER, 3.0)
    assert (acc.task, acc.metric, acc.value, acc.stderr) == ("lm-eval/piqa", "acc", 0.5, 0.25)
    assert (acc.version, acc.samples, acc.higher_is_better) == (1, 2, True)
    assert acc.per_sample == build_ratios([1, 0])
    assert acc.data_fingerprint is not None
    assert (word.unit, word.higher_is_better, word.stderr) == ("per word", False, None)
    assert exact.metric == "exact_match (strict-match)"


def test_samples_that_do_not_give_the_value_are_left_out() -> None:
    assert _read_samples([{"f1": 1.0}, {"f1": 0.0}], "f1", 0.7) is None
    assert _read_samples([{"f1": [0, 1]}], "f1", 1.0) is None
    assert _read_samples([], "f1", 1.0) is None


def test_summed_metrics_get_the_error_of_a_ratio_over_documents() -> None:
    samples = [{"bits_per_byte": [-30.0, 20]}, {"bits_per_byte": (-70.0, 40)}]
    parts = _read_samples(samples, "bits_per_byte", 100 / 60 / math.log(2))
    assert parts == build_ratios([30, 70], [20, 40], "bits")
    residuals = np.array([30 - 100 / 60 * 20, 70 - 100 / 60 * 40])
    by_hand = np.sqrt((residuals**2).sum() * 2 / 1) / 60 / math.log(2)
    assert _choose_stderr("N/A", parts) == pytest.approx(by_hand)
    assert _choose_stderr(0.5, parts) == 0.5
    assert _choose_stderr("N/A", None) is None
    assert _read_samples(samples, "bits_per_byte", 1.0) is None


def test_a_file_that_is_no_task_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    file = tmp_path / "mine.yaml"
    for content in (b"x: 1", b"caf\xe9"):
        file.write_bytes(content)
        with pytest.raises(CptqError, match=r"mine\.yaml"):
            resolve_tasks((str(file),))
    with pytest.raises(EvaluationError, match=r"none\.yaml"):
        resolve_tasks((str(tmp_path / "none.yaml"),))


def test_a_classifier_is_refused(load, heard) -> None:
    with pytest.raises(EvaluationError, match=r"causal-lm.*classifier"):
        prepare_harness(load("bert"), ["piqa"], EvalOptions(), heard)


def test_tasks_are_loaded_once_and_run_as_they_were_loaded(
    load, heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a stand-in for the harness: its data are read in `prepare`, and given back to it."""
    loads: list[list[str]] = []
    task = SimpleNamespace(eval_docs=[{"text": "first"}, {"text": ["second"]}, {"text": "third"}])

    def load_names(names: list[str]) -> dict[str, object]:
        loads.append([*names, str(random.random())])
        return {"tasks": {"part": task}, "groups": {}}

    def simple_evaluate(*, task_manager, tasks, limit, random_seed, **_: object):
        random.seed(random_seed)
        loaded = task_manager.load(tasks)["tasks"]["part"]
        seen.append((loaded, limit, random_seed, random.random()))
        return ANSWER

    seen: list[tuple[object, float | None, int, float]] = []
    manager = SimpleNamespace(load=load_names, task_index={"part": 1})
    monkeypatch.setattr(harness, "resolve_tasks", lambda tasks: (manager, list(tasks)))
    fake = SimpleNamespace(simple_evaluate=simple_evaluate)
    monkeypatch.setattr(harness, "import_harness", lambda: fake)
    monkeypatch.setattr(harness, "_build_runner", lambda model, options: None)
    monkeypatch.setattr(harness, "_read_release", lambda: "0.4.13")
    model, options = load("llama"), EvalOptions(limit=2, seed=5)
    prepared = prepare_harness(model, ["group"], options, heard)
    assert prepared.documents == {"lm-eval/part": ("first", "second")}
    found = prepared.measure(model, options, heard)
    assert [result.task for result in found] == ["lm-eval/piqa"] * 3
    # a task may shuffle its documents, when it is loaded and later: always by the seed, and as if
    # it had been loaded by the run itself
    expected = random.Random(5)
    assert loads == [["group", str(expected.random())]]
    assert seen == [(task, 2, 5, expected.random())]
    assert replace(prepared, limit=None).documents["lm-eval/part"][2] == "third"


def test_a_task_that_cannot_be_loaded_is_named(load, heard, monkeypatch) -> None:
    def fail(names: list[str]) -> None:
        raise FileNotFoundError("no such data set")

    manager = SimpleNamespace(load=fail)
    monkeypatch.setattr(harness, "resolve_tasks", lambda tasks: (manager, list(tasks)))
    with pytest.raises(EvaluationError, match=r"group.*no such data set"):
        prepare_harness(load("llama"), ["group"], EvalOptions(), heard)


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
