from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cptq.errors import DataError, EvaluationError, UnknownNameError
from cptq.evaluation import TASK_KINDS, TASKS, check_task, check_task_kind, list_tasks


def test_names_are_checked_without_torch() -> None:
    code = (
        "import sys; from cptq.evaluation import check_task_kind;"
        "check_task_kind('glue/sst2', 'classifier'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_task_is_there_and_says_for_whom() -> None:
    assert list(TASK_KINDS) == TASKS.list_names()
    assert all(callable(TASKS.get(name)) for name in TASKS)


def test_an_unknown_task_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="'wikitex'") as caught:
        check_task("wikitex")
    assert "'wikitext'" in str(caught.value.hint)


def test_a_file_is_a_task_by_its_path_or_with_a_prefix(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text")
    assert check_task(str(path)) == f"text:{path}"
    assert check_task(f"text:{path}") == f"text:{path}"
    for missing in ("absent.txt", "text:absent.txt", "text:wikitext"):
        with pytest.raises((DataError, UnknownNameError)):
            check_task(missing)


def test_a_classifier_is_refused_wikitext_and_told_what_it_can_do() -> None:
    with pytest.raises(EvaluationError) as caught:
        check_task_kind("wikitext", "classifier")
    assert all(word in caught.value.problem for word in ("wikitext", "causal-lm", "classifier"))
    assert caught.value.allowed == (
        "glue/cola, glue/sst2, glue/mrpc, glue/stsb, glue/stsb-test, glue/qqp, glue/mnli, "
        "glue/mnli-mm, glue/qnli, glue/rte, glue/wnli, glue/ax, footprint for a classifier"
    )


def test_a_causal_lm_is_refused_glue() -> None:
    with pytest.raises(EvaluationError) as caught:
        check_task_kind("glue/sst2", "causal-lm")
    allowed = str(caught.value.allowed)
    assert allowed.startswith("wikitext, wikitext103, ptb, c4, pydoc, wikitext-rolling")
    assert allowed.endswith("footprint, text:PATH for a causal-lm")
    assert str(caught.value.hint).endswith("the task sst2 for a causal-lm")
    with pytest.raises(EvaluationError) as caught:
        check_task_kind("mnli_mismatch", "classifier")
    assert str(caught.value.hint).endswith("the task glue/mnli-mm for a classifier")
    with pytest.raises(EvaluationError) as caught:
        check_task_kind("hellaswag", "classifier")
    assert caught.value.hint is None
    assert list_tasks("masked-lm") == ["glue/stsb", "glue/stsb-test", "footprint"]
    assert list_tasks("encoder") == ["glue/stsb", "glue/stsb-test", "footprint"]
