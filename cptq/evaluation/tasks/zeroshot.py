"""Questions answered without examples: the choice whose text the model finds likeliest.

`acc` takes the greatest log-likelihood, `acc_norm` the greatest per character of the choice.
Lambada tests whether the last word is the greedy continuation, and how perplexed the model is.
Their standard errors are those of a mean, sqrt(variance / n) with n - 1 in the variance, as the
harness computes them; those of `f1` and `matthews` are bootstrapped.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cptq.checkpoint.model import LoadedModel, ModelSpec
from cptq.data import load_glue
from cptq.data.questions import load_questions
from cptq.errors import DataError
from cptq.evaluation.continuations import (
    Encoder,
    RequestBatch,
    Scores,
    batch_requests,
    choose_length,
    score_requests,
)
from cptq.evaluation.metrics import METRICS as SENTENCE_METRICS
from cptq.evaluation.metrics import Values, estimate_standard_error
from cptq.evaluation.perplexity import Estimate, estimate_ratio, exponentiate
from cptq.evaluation.prompts import FORMATS, GLUE_FORMATS, Question, build_glue_question
from cptq.evaluation.task import EvalOptions
from cptq.types import Emit, EvalResult, PerSample, digest
from cptq.types.samples import build_pairs, build_ratios

#: metrics over all labels and predictions at once; the harness calls matthews `mcc`
_OVER_ALL = ("f1", "matthews")
_UNITS = {"perplexity": "per word", "matthews": "correlation", "f1": "share"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedQuestions:
    """Questions, and what the model is asked: a request for every choice, in order."""

    name: str
    questions: tuple[Question, ...]
    requests: RequestBatch
    metrics: tuple[str, ...]
    version: int
    origin: str
    sha256: str
    fingerprint: str

    @property
    def documents(self) -> Mapping[str, Sequence[str]]:
        """The context of every question."""
        contexts = (context for q in self.questions for context, _ in q.pairs[:1])
        return {self.name: tuple(contexts)}

    def measure(self, model: LoadedModel, options: EvalOptions, emit: Emit) -> list[EvalResult]:
        """Score every choice and compare the likeliest with the answers.

        Raises:
            EvaluationError: an output is not finite.
        """
        begin = time.perf_counter()
        scores = score_requests(
            model, self.requests, batch_size=options.batch_size, name=self.name, emit=emit
        )
        seconds, truncated = time.perf_counter() - begin, self.requests.truncated
        notes = (f"{truncated} contexts cut on the left",) if truncated else ()
        found = [(m, *_evaluate(m, self.questions, scores, options.seed)) for m in self.metrics]
        return [
            EvalResult(
                task=self.name,
                version=self.version,
                metric=metric,
                value=estimate.value,
                stderr=estimate.stderr,
                unit=_UNITS.get(metric, "of questions"),
                higher_is_better=metric != "perplexity",
                samples=len(self.questions),
                seconds=seconds,
                tokens=self.requests.tokens,
                data_source=self.origin,
                data_sha256=self.sha256,
                data_fingerprint=self.fingerprint,
                per_sample=per_sample,
                notes=notes,
            )
            for metric, estimate, per_sample in found
        ]


def prepare_glue_questions(
    spec: ModelSpec, name: str, options: EvalOptions, emit: Emit
) -> PreparedQuestions:
    """Turn the dev part of a GLUE task, `name` in `GLUE_FORMATS`, into questions.

    Raises:
        DataError: the data is missing or malformed.
        EvaluationError: no tokenizer, or an answer longer than the model takes.
    """
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
    questions = [build_glue_question(form, texts, int(label)) for texts, label in rows]
    requests = _encode(spec, name, questions, options, emit)
    return PreparedQuestions(
        name=name,
        questions=tuple(questions),
        requests=requests,
        metrics=form.metrics,
        version=form.version,
        origin=found.origin,
        sha256=found.sha256,
        fingerprint=_fingerprint(questions),
    )


def prepare_choices(
    spec: ModelSpec, name: str, options: EvalOptions, emit: Emit
) -> PreparedQuestions:
    """Read a set of questions with choices, or Lambada; `name` in `FORMATS`.

    Raises:
        DataError: the data is missing, or a row lacks what a question needs.
        EvaluationError: no tokenizer, or an answer longer than the model takes.
    """
    form = FORMATS[name]
    found = load_questions(
        name, data_dir=options.data_dir, cache_dir=options.cache_dir, token=options.token
    )
    questions = []
    for number, row in enumerate(found.rows[: options.count(len(found.rows))], start=1):
        try:
            questions.append(form.ask(row))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{found.origin} line {number} is not a question of {name}: "
                f"{type(error).__name__} {error}"
            ) from error
    return PreparedQuestions(
        name=name,
        questions=tuple(questions),
        requests=_encode(spec, name, questions, options, emit),
        metrics=form.metrics,
        version=form.version,
        origin=found.origin,
        sha256=found.sha256,
        fingerprint=_fingerprint(questions),
    )


def _encode(
    spec: ModelSpec, name: str, questions: Iterable[Question], options: EvalOptions, emit: Emit
) -> RequestBatch:
    encoder, length = Encoder(spec, name), choose_length(spec, options.seqlen)
    pairs_of_all = (pair for question in questions for pair in question.pairs)
    requests = (encoder.build_request(*pair) for pair in pairs_of_all)
    return batch_requests(requests, length=length, name=name, emit=emit)


def _fingerprint(questions: Iterable[Question]) -> str:
    return digest([[q.pairs, q.gold] for q in questions])


def _evaluate(
    metric: str, questions: Sequence[Question], scores: Scores, seed: int
) -> tuple[Estimate, PerSample]:
    if metric == "perplexity":
        nll = -scores.loglikelihood.numpy()
        return exponentiate(estimate_ratio(nll, np.ones(len(nll)))), build_ratios(nll, link="exp")
    if metric == "acc" and all(len(question.pairs) == 1 for question in questions):
        return _average(scores.greedy.numpy().astype(np.float64))
    gold = np.array([question.gold for question in questions], dtype=np.float64)
    picked = pick_choices(questions, scores, by_length=metric == "acc_norm")
    if metric not in _OVER_ALL:
        return _average((picked == gold).astype(np.float64))
    stderr = estimate_standard_error(metric, gold, picked, seed)
    value = SENTENCE_METRICS[metric](gold, picked)
    return Estimate(value=value, stderr=stderr), build_pairs(gold, picked)


def pick_choices(questions: Sequence[Question], scores: Scores, *, by_length: bool) -> Values:
    """Pick the choice with the greatest log-likelihood (per character), of equal ones the first."""
    found, start = [], 0
    for question in questions:
        values = scores.loglikelihood[start : start + len(question.pairs)].numpy()
        start += len(question.pairs)
        found.append(int(np.argmax(values / np.array(question.lengths) if by_length else values)))
    return np.array(found, dtype=np.float64)


def _average(hits: Values) -> tuple[Estimate, PerSample]:
    stderr = float(hits.std(ddof=1) / np.sqrt(len(hits))) if len(hits) > 1 else None
    return Estimate(value=float(hits.mean()), stderr=stderr), build_ratios(hits)
