"""Tasks as text to continue, word for word as lm-evaluation-harness 0.4 words them zero-shot.

A question has one context and one continuation per choice (a space and the choice). Winogrande
reverses that: the choice fills the blank in the context, and all choices share the continuation.
Lambada has one continuation, the last word. The texts, the order of the choices and the versions
are those of the harness's task files (`lm_eval/tasks/...`), whose names the tasks have.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Sentences = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """`pairs[i]` is (context, continuation) of choice i; `lengths[i]` its characters; the answer
    is choice `gold`."""

    pairs: tuple[tuple[str, str], ...]
    lengths: tuple[int, ...]
    gold: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How rows of a data set become questions, and which metrics are reported."""

    ask: Callable[[Row], Question]
    metrics: tuple[str, ...]
    version: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GlueFormat:
    """How sentences of a GLUE task become a context; `choices` in the order of the labels."""

    task: str
    context: Callable[[Sentences], str]
    choices: tuple[str, ...]
    metrics: tuple[str, ...] = ("acc",)
    version: int = 1


def build_question(context: str, choices: tuple[str, ...] | list[str], gold: int) -> Question:
    """Build a question of one context, with a space and each choice after it."""
    return Question(
        pairs=tuple((context, f" {choice}") for choice in choices),
        lengths=tuple(len(choice) for choice in choices),
        gold=gold,
    )


def _ask_hellaswag(row: Row) -> Question:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [_strip_brackets(ending) for ending in row["endings"]]
    return build_question(_strip_brackets(context), endings, int(row["label"]))


def _strip_brackets(text: str) -> str:
    """Remove WikiHow's marks."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _ask_piqa(row: Row) -> Question:
    context = f"Question: {row['goal']}\nAnswer:"
    return build_question(context, [row["sol1"], row["sol2"]], int(row["label"]))


def _ask_arc(row: Row) -> Question:
    return _ask_lettered(f"Question: {row['question']}\nAnswer:", row)


def _ask_openbookqa(row: Row) -> Question:
    return _ask_lettered(row["question_stem"], row)


def _ask_lettered(context: str, row: Row) -> Question:
    choices = row["choices"]
    return build_question(
        context, choices["text"], choices["label"].index(row["answerKey"].lstrip())
    )


def _ask_winogrande(row: Row) -> Question:
    before, _, after = row["sentence"].partition("_")
    options = (row["option1"], row["option2"])
    # the harness divides by the lengths of the choices, which are the contexts here
    return Question(
        pairs=tuple((before + option, f" {after.strip()}") for option in options),
        lengths=tuple(len(before + option) for option in options),
        gold={"1": 0, "2": 1}[str(row["answer"])],
    )


def _ask_boolq(row: Row) -> Question:
    context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return build_question(context, ("no", "yes"), int(row["label"]))


def _ask_lambada(row: Row) -> Question:
    *words, last = row["text"].split(" ")
    return Question(pairs=((" ".join(words), f" {last}"),), lengths=(len(last),), gold=0)


_BOTH = ("acc", "acc_norm")
FORMATS: Mapping[str, Format] = {
    "hellaswag": Format(ask=_ask_hellaswag, metrics=_BOTH),
    "piqa": Format(ask=_ask_piqa, metrics=_BOTH),
    "arc_easy": Format(ask=_ask_arc, metrics=_BOTH),
    "arc_challenge": Format(ask=_ask_arc, metrics=_BOTH),
    "winogrande": Format(ask=_ask_winogrande, metrics=("acc",)),
    "boolq": Format(ask=_ask_boolq, metrics=("acc",), version=2),
    "openbookqa": Format(ask=_ask_openbookqa, metrics=_BOTH),
    "lambada_openai": Format(ask=_ask_lambada, metrics=("acc", "perplexity")),
    "lambada_standard": Format(ask=_ask_lambada, metrics=("acc", "perplexity")),
}


def _ask_mnli(pair: Sentences) -> str:
    premise, hypothesis = pair[0], pair[1].strip()
    stop = "" if hypothesis.endswith(".") else "."
    return f"{premise}\nQuestion: {hypothesis}{stop} True, False or Neither?\nAnswer:"


def _ask_true_or_false(pair: Sentences) -> str:
    return f"{pair[0]}\nQuestion: {pair[1]} True or False?\nAnswer:"


_MNLI_CHOICES = ("True", "Neither", "False")
GLUE_FORMATS: Mapping[str, GlueFormat] = {
    "cola": GlueFormat(
        task="cola",
        context=lambda s: f"{s[0]}\nQuestion: Does this sentence make sense?\nAnswer:",
        choices=("no", "yes"),
        metrics=("matthews",),
    ),
    "sst2": GlueFormat(
        task="sst2",
        context=lambda s: f"{s[0]}\nQuestion: Is this sentence positive or negative?\nAnswer:",
        choices=("negative", "positive"),
    ),
    "mrpc": GlueFormat(
        task="mrpc",
        context=lambda s: (
            f"Sentence 1: {s[0]}\nSentence 2: {s[1]}\n"
            "Question: Do both sentences mean the same thing?\nAnswer:"
        ),
        choices=("no", "yes"),
        metrics=("acc", "f1"),
    ),
    "qqp": GlueFormat(
        task="qqp",
        context=lambda s: (
            f"Question 1: {s[0]}\nQuestion 2: {s[1]}\n"
            "Question: Do both questions ask the same thing?\nAnswer:"
        ),
        choices=("no", "yes"),
        metrics=("acc", "f1"),
        version=2,
    ),
    "mnli": GlueFormat(task="mnli", context=_ask_mnli, choices=_MNLI_CHOICES),
    "mnli_mismatch": GlueFormat(task="mnli-mm", context=_ask_mnli, choices=_MNLI_CHOICES),
    "qnli": GlueFormat(
        task="qnli",
        context=lambda s: (
            f"{s[0]}\n{s[1]}\nQuestion: Does this response answer the question?\nAnswer:"
        ),
        choices=("yes", "no"),
    ),
    "rte": GlueFormat(task="rte", context=_ask_true_or_false, choices=("True", "False")),
    "wnli": GlueFormat(
        task="wnli", context=_ask_true_or_false, choices=("False", "True"), version=2
    ),
}


def build_glue_question(form: GlueFormat, sentences: Sentences, label: int) -> Question:
    """Build a question from a labelled sentence or pair."""
    return build_question(form.context(sentences), form.choices, label)
