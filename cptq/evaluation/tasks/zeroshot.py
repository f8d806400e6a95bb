"""Questions answered without examples: the choice whose text the model finds likeliest.

`acc` takes the greatest log-likelihood, `acc_norm` the greatest per character of the choice.
Lambada asks whether the last word is the greedy continuation, and how perplexed the model is. Their
standard errors are those of a mean, sqrt(variance / n) with n - 1 in the variance, as the harness
gives them; those of `f1` and `matthews` are bootstrapped.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cptq.checkpoint.model import LoadedModel
from cptq.data import load_glue
from cptq.data.questions import load_questions
from cptq.errors import DataError
from cptq.evaluation.continuations import Encoder, Scores, context_length, score
from cptq.evaluation.metrics import METRICS as SENTENCE_METRICS
from cptq.evaluation.metrics import Values, standard_error
from cptq.evaluation.options import EvalOptions
from cptq.evaluation.perplexity import Estimate, exponential, ratio
from cptq.evaluation.prompts import FORMATS, GLUE_FORMATS, Question, glue_question
from cptq.types import Emit, EvalResult, PerSample, digest
from cptq.types.samples import build_pairs, build_ratios

#: metrics over all labels and predictions at once; the harness calls matthews `mcc`
_OVER_ALL = ("f1", "matthews")
_UNITS = {"perplexity": "per word", "matthews": "correlation", "f1": "share"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The questions of a task, all of them or the first of a limit, and where they are from."""

    questions: tuple[Question, ...]
    metrics: tuple[str, ...]
    version: int
    origin: str
    sha256: str


def glue(model: LoadedModel, name: str, options: EvalOptions, emit: Emit) -> list[EvalResult]:
    """A task of GLUE's dev part, `name` in `GLUE_FORMATS`."""
    form = GLUE_FORMATS[name]
    found = load_glue(
        form.task,
        "dev",
        data_dir=options.data_dir,
        cache_dir=options.cache_dir,
        token=options.token,
    )
    found = found.first(options.count(len(found)))
    rows = zip(found.sentences, found.labels, strict=True)
    asked = Asked(
        questions=tuple(glue_question(form, texts, int(label)) for texts, label in rows),
        metrics=form.metrics,
        version=form.version,
        origin=found.origin,
        sha256=found.sha256,
    )
    return _measure(model, name, asked, options, emit)


def choices(model: LoadedModel, name: str, options: EvalOptions, emit: Emit) -> list[EvalResult]:
    """A set of questions with choices, or Lambada; `name` in `FORMATS`."""
    form = FORMATS[name]
    found = load_questions(
        name, data_dir=options.data_dir, cache_dir=options.cache_dir, token=options.token
    )
    rows = found.rows[: options.count(len(found.rows))]
    questions = []
    for number, row in enumerate(rows, start=1):
        try:
            questions.append(form.ask(row))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{found.origin} line {number} is no question of {name}: "
                f"{type(error).__name__} {error}"
            ) from error
    asked = Asked(
        questions=tuple(questions),
        metrics=form.metrics,
        version=form.version,
        origin=found.origin,
        sha256=found.sha256,
    )
    return _measure(model, name, asked, options, emit)


def _measure(
    model: LoadedModel, name: str, asked: Asked, options: EvalOptions, emit: Emit
) -> list[EvalResult]:
    begin = time.perf_counter()
    options.watch(name, [context for q in asked.questions for context, _ in q.pairs[:1]])
    encoder = Encoder(model, name)
    length = context_length(model, options.seqlen)
    requests = [encoder.request(*pair) for question in asked.questions for pair in question.pairs]
    scores = score(
        model, requests, length=length, batch_size=options.batch_size, name=name, emit=emit
    )
    notes = (f"{scores.truncated} contexts cut on the left",) if scores.truncated else ()
    seconds = time.perf_counter() - begin
    fingerprint = digest([[q.pairs, q.gold] for q in asked.questions])
    found = [(m, *_metric(m, asked.questions, scores, options.seed)) for m in asked.metrics]
    return [
        EvalResult(
            task=name,
            version=asked.version,
            metric=metric,
            value=estimate.value,
            stderr=estimate.stderr,
            unit=_UNITS.get(metric, "of questions"),
            higher_is_better=metric != "perplexity",
            samples=len(asked.questions),
            seconds=seconds,
            tokens=sum(len(r.context) + len(r.continuation) for r in requests),
            data_source=asked.origin,
            data_sha256=asked.sha256,
            data_fingerprint=fingerprint,
            per_sample=per_sample,
            notes=notes,
        )
        for metric, estimate, per_sample in found
    ]


def _metric(
    metric: str, questions: Sequence[Question], scores: Scores, seed: int
) -> tuple[Estimate, PerSample]:
    if metric == "perplexity":
        nll = -scores.loglikelihood.numpy()
        return exponential(ratio(nll, np.ones(len(nll)))), build_ratios(nll, link="exp")
    if metric == "acc" and all(len(question.pairs) == 1 for question in questions):
        return _mean(scores.greedy.numpy().astype(np.float64))
    gold = np.array([question.gold for question in questions], dtype=np.float64)
    picked = predictions(questions, scores, by_length=metric == "acc_norm")
    if metric not in _OVER_ALL:
        return _mean((picked == gold).astype(np.float64))
    stderr = standard_error(metric, gold, picked, seed)
    return Estimate(value=SENTENCE_METRICS[metric](gold, picked), stderr=stderr), build_pairs(
        gold, picked
    )


def predictions(questions: Sequence[Question], scores: Scores, *, by_length: bool) -> Values:
    """(questions,): the choice with the greatest log-likelihood (per character), ties the first."""
    found, start = [], 0
    for question in questions:
        values = scores.loglikelihood[start : start + len(question.pairs)].numpy()
        start += len(question.pairs)
        found.append(int(np.argmax(values / np.array(question.lengths) if by_length else values)))
    return np.array(found, dtype=np.float64)


def _mean(hits: Values) -> tuple[Estimate, PerSample]:
    stderr = float(hits.std(ddof=1) / np.sqrt(len(hits))) if len(hits) > 1 else None
    return Estimate(value=float(hits.mean()), stderr=stderr), build_ratios(hits)
