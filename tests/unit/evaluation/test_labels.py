from __future__ import annotations

from types import SimpleNamespace

import pytest

from cptq.errors import EvaluationError
from cptq.evaluation.tasks.glue import match_labels, require_score

SST2 = ("negative", "positive")
COLA = ("unacceptable", "acceptable")


def config(*names: str) -> SimpleNamespace:
    return SimpleNamespace(num_labels=len(names), id2label=dict(enumerate(names)))


@pytest.mark.parametrize(
    ("task", "names", "order"),
    [
        ("glue/sst2", ("negative", "positive"), [0, 1]),
        ("glue/sst2", ("POSITIVE", "NEGATIVE"), [1, 0]),
        ("glue/sst2", ("pos", "neg"), [1, 0]),
        ("glue/cola", ("acceptable", "not acceptable"), [1, 0]),
    ],
)
def test_names_decide_the_order(heard, task: str, names: tuple[str, ...], order) -> None:
    labels = SST2 if task == "glue/sst2" else COLA
    assert match_labels(config(*names), task, labels, heard) == order
    assert not heard


@pytest.mark.parametrize("names", [("LABEL_0", "LABEL_1"), ("0", "1")])
def test_names_that_say_nothing_are_taken_in_order_and_that_is_said(heard, names) -> None:
    assert match_labels(config(*names), "glue/sst2", SST2, heard) == [0, 1]
    assert len(heard.notices) == 1
    assert all(part in heard.notices[0] for part in (", ".join(names), "negative, positive"))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("contradiction", "neutral", "entailment"), "3 labels"),
        (("entailment", "not_entailment"), "entailment, not_entailment"),
        (("negative", "neg"), "negative, neg"),
        (("score",), "1 labels"),
    ],
)
def test_labels_of_another_task_are_refused(heard, names, words: str) -> None:
    with pytest.raises(EvaluationError) as caught:
        match_labels(config(*names), "glue/sst2", SST2, heard)
    assert words in str(caught.value)
    assert "negative, positive" in str(caught.value)


def test_a_regressor_has_one_output() -> None:
    require_score(config("LABEL_0"), "glue/stsb")
    with pytest.raises(EvaluationError, match="2 outputs"):
        require_score(config("a", "b"), "glue/stsb")
