from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cptq.errors import DataError
from cptq.evaluation.continuations import Encoder, Scores
from cptq.evaluation.prompts import FORMATS, GLUE_FORMATS, Question, build_glue_question
from cptq.evaluation.task import EvalOptions, evaluate
from cptq.evaluation.tasks.zeroshot import pick_choices
from tests.reference.likelihood import naive_score
from tests.unit.evaluation.task_data import LETTERS, ROWS, write_questions


@pytest.mark.parametrize("name", ROWS)
def test_questions_are_worded_as_the_harness_words_them(name: str) -> None:
    row, first, last, lengths, gold = ROWS[name]
    question = FORMATS[name].ask(row)
    assert (question.pairs[0], question.pairs[-1]) == (first, last)
    assert (question.lengths, question.gold) == (lengths, gold)


@pytest.mark.parametrize(
    ("name", "sentences", "context"),
    [
        ("sst2", ("good .",), "good .\nQuestion: Is this sentence positive or negative?\nAnswer:"),
        ("cola", ("It is.",), "It is.\nQuestion: Does this sentence make sense?\nAnswer:"),
        (
            "mrpc",
            ("a", "b"),
            "Sentence 1: a\nSentence 2: b\n"
            "Question: Do both sentences mean the same thing?\nAnswer:",
        ),
        (
            "qqp",
            ("a", "b"),
            "Question 1: a\nQuestion 2: b\n"
            "Question: Do both questions ask the same thing?\nAnswer:",
        ),
        ("mnli", ("a", " b "), "a\nQuestion: b. True, False or Neither?\nAnswer:"),
        ("mnli_mismatch", ("a", "b."), "a\nQuestion: b. True, False or Neither?\nAnswer:"),
        ("qnli", ("a?", "b"), "a?\nb\nQuestion: Does this response answer the question?\nAnswer:"),
        ("rte", ("a", "b"), "a\nQuestion: b True or False?\nAnswer:"),
        ("wnli", ("a", "b"), "a\nQuestion: b True or False?\nAnswer:"),
    ],
)
def test_glue_is_worded_as_the_harness_words_it(name, sentences, context) -> None:
    form = GLUE_FORMATS[name]
    question = build_glue_question(form, sentences, 1)
    assert question.pairs == tuple((context, f" {choice}") for choice in form.choices)
    assert question.gold == 1


def naive_choices(model, questions: list[Question]) -> list[list[float]]:
    encoder = Encoder(model, "a task")
    asked = [[encoder.build_request(*pair) for pair in question.pairs] for question in questions]
    return [
        [naive_score(model.module, r.context, r.continuation, 256)[0] for r in rows]
        for rows in asked
    ]


@pytest.mark.parametrize("batch_size", [1, 7])
def test_a_model_is_scored_by_its_likeliest_choices(
    load, heard, tmp_path: Path, batch_size: int
) -> None:
    words = ["fox", "lazy dog", "warm sun in the forest", "girl"]
    rows = [
        {
            "question": f"{a} and {b}?",
            "choices": {"text": [a, b, "the mother"], "label": ["1", "2", "3"]},
            "answerKey": str(1 + (i + j) % 3),
        }
        for i, a in enumerate(words)
        for j, b in enumerate(words)
    ]
    model, data = load("llama"), write_questions(tmp_path, "arc_easy", rows)
    options = EvalOptions(data_dir=data, batch_size=batch_size)
    acc, norm = evaluate(model, "arc_easy", options, heard)
    questions = [FORMATS["arc_easy"].ask(row) for row in rows]
    scores = naive_choices(model, questions)
    golds = [question.gold for question in questions]
    hits = [float(row.index(max(row)) == gold) for row, gold in zip(scores, golds, strict=True)]
    shares = [
        [value / length for value, length in zip(row, q.lengths, strict=True)]
        for row, q in zip(scores, questions, strict=True)
    ]
    assert 0 < sum(hits) < 16
    assert (acc.value, norm.value) == (
        np.mean(hits),
        np.mean([row.index(max(row)) == gold for row, gold in zip(shares, golds, strict=True)]),
    )
    assert acc.stderr == pytest.approx(np.std(hits, ddof=1) / 4)
    assert acc.per_sample.numerators == tuple(hits)
    assert (acc.metric, norm.metric, acc.version, acc.samples) == ("acc", "acc_norm", 1, 16)
    first = evaluate(model, "arc_easy", EvalOptions(data_dir=data, limit=5), heard)[0]
    assert (first.samples, first.value) == (5, np.mean(hits[:5]))


def test_lambada_is_greedy_or_not_and_perplexed(load, heard, tmp_path: Path) -> None:
    rows = [{"text": "the small cat sleeps"}, {"text": "numbers such as these"}]
    model = load("llama")
    acc, perplexity = evaluate(
        model,
        "lambada_openai",
        EvalOptions(data_dir=write_questions(tmp_path, "lambada_openai", rows)),
        heard,
    )
    scores = naive_choices(model, [FORMATS["lambada_openai"].ask(row) for row in rows])
    assert perplexity.value == pytest.approx(math.exp(-np.mean(scores)), rel=1e-5)
    assert (acc.value, perplexity.higher_is_better) == (0, False)


def test_glue_from_its_own_files(load, heard, tmp_path: Path) -> None:
    labels = [1, 0, 1, 1, 0, 1]
    (tmp_path / "SST-2").mkdir()
    lines = [f"film {'so ' * i}good\t{label}" for i, label in enumerate(labels)]
    (tmp_path / "SST-2" / "dev.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    (tmp_path / "CoLA").mkdir()
    (tmp_path / "CoLA" / "dev.tsv").write_text(
        "".join(f"s\t{label}\t\tIt is {'so ' * i}.\n" for i, label in enumerate(labels))
    )
    model = load("gpt2")
    (acc,) = evaluate(model, "sst2", EvalOptions(data_dir=tmp_path), heard)
    questions = [
        build_glue_question(GLUE_FORMATS["sst2"], (f"film {'so ' * i}good",), label)
        for i, label in enumerate(labels)
    ]
    picked = [row.index(max(row)) for row in naive_choices(model, questions)]
    assert acc.value == np.mean([p == label for p, label in zip(picked, labels, strict=True)])
    (matthews,) = evaluate(model, "cola", EvalOptions(data_dir=tmp_path), heard)
    assert (matthews.metric, matthews.per_sample.labels) == ("matthews", tuple(labels))
    assert -1 <= matthews.value <= 1


def test_ties_go_to_the_first_and_length_divides() -> None:
    question = Question(pairs=(("a", " b"), ("a", " cccc")), lengths=(1, 4), gold=0)
    greedy = torch.zeros(2).bool()
    scores = Scores(loglikelihood=torch.tensor([-2.0, -4.0]), greedy=greedy)
    assert pick_choices([question], scores, by_length=False).tolist() == [0]
    assert pick_choices([question], scores, by_length=True).tolist() == [1]
    same = Scores(loglikelihood=torch.tensor([-2.0, -2.0]), greedy=greedy)
    assert pick_choices([question], same, by_length=False).tolist() == [0]


def test_a_row_that_is_not_a_question_is_named(load, heard, tmp_path: Path) -> None:
    row = {"question": "Which?", "choices": LETTERS, "answerKey": "E"}
    data = write_questions(tmp_path, "arc_challenge", [row])
    with pytest.raises(DataError, match=r"test\.jsonl line 1 .*arc_challenge"):
        evaluate(load("llama"), "arc_challenge", EvalOptions(data_dir=data), heard)
