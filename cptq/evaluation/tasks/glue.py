"""GLUE's nine tasks on their dev parts, and the diagnostic set AX, by GLUE's own metrics.

Sequence classifiers answer with their logits: the label of the greatest one, or for STS-B the one
score. Sentence encoders answer STS-B with the cosine of two embeddings (cptq.evaluation.embedding).
Two sentences are given to the tokenizer as a pair, so that it puts between them what it is used to.

MNLI's two dev parts are two tasks, `glue/mnli` (matched) and `glue/mnli-mm`; `glue/stsb-test` is
the labelled test part of STS-B. Source: Wang et al. 2018, table 1; AX is judged by Matthews
correlation over its three classes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cptq.checkpoint.model import LoadedModel
from cptq.data import GlueSet, load_glue
from cptq.evaluation.embedding import cosine, pool, read_length, read_pooling
from cptq.evaluation.labels import class_order, require_score
from cptq.evaluation.metrics import METRICS, Values, error_words, is_constant, standard_error
from cptq.evaluation.options import EvalOptions
from cptq.evaluation.sentences import Batch, Encoded, encode, forward
from cptq.types import Emit, EvalResult, Notice
from cptq.types.samples import build_pairs, build_ratios

VERSION = 1
#: task -> GLUE's metrics for a classifier, the main one first
REPORTED: Mapping[str, tuple[str, ...]] = {
    "glue/cola": ("matthews", "accuracy"),
    "glue/sst2": ("accuracy",),
    "glue/mrpc": ("f1", "accuracy"),
    "glue/stsb": ("pearson", "spearman"),
    "glue/stsb-test": ("pearson", "spearman"),
    "glue/qqp": ("f1", "accuracy"),
    "glue/mnli": ("accuracy",),
    "glue/mnli-mm": ("accuracy",),
    "glue/qnli": ("accuracy",),
    "glue/rte": ("accuracy",),
    "glue/wnli": ("accuracy",),
    "glue/ax": ("matthews", "accuracy"),
}
UNITS = {"accuracy": "share of samples", "f1": "F1 of the class 1"}


def classes(model: LoadedModel, name: str, options: EvalOptions, emit: Emit) -> list[EvalResult]:
    """A task with classes, by a sequence classifier.

    Raises:
        EvaluationError: the classifier's labels are not the task's, no tokenizer, or outputs that
            are not finite.
        DataError: the data is missing, empty or malformed.
    """
    begin = time.perf_counter()
    found = _load(name, options, emit)
    order = class_order(model.config, name, found.label_names, emit)
    logits, encoded = _logits(model, name, found.sentences, options, emit)
    predictions = np.array(order, dtype=np.float64)[logits.argmax(1).numpy()]
    return _results(name, REPORTED[name], found, predictions, encoded, options, emit, begin, ())


def stsb(model: LoadedModel, name: str, options: EvalOptions, emit: Emit) -> list[EvalResult]:
    """Correlation of similarities with human scores: a regressor's, or the cosine of embeddings."""
    begin = time.perf_counter()
    found = _load(name, options, emit)
    how: tuple[str, ...] = ()
    metrics = REPORTED[name]
    if model.kind == "classifier":
        require_score(model.config, name)
        logits, encoded = _logits(model, name, found.sentences, options, emit)
        predictions = logits[:, 0].double()
    else:
        predictions, encoded, how = _similarities(model, name, found, options, emit)
        metrics = metrics[::-1]  # embeddings are judged by ranks
    values = predictions.numpy()
    return _results(name, metrics, found, values, encoded, options, emit, begin, how)


def _load(name: str, options: EvalOptions, emit: Emit) -> GlueSet:
    task = name.removeprefix("glue/").removesuffix("-test")
    found = load_glue(
        task,
        "test" if name.endswith("-test") else "dev",
        data_dir=options.data_dir,
        cache_dir=options.cache_dir,
        token=options.token,
    )
    for note in found.notes:
        emit(Notice(kind="skipped", subject=name, message=note))
    found = found.first(options.count(len(found)))
    options.watch(name, [sentence for pair in found.sentences for sentence in pair])
    return found


def _logits(
    model: LoadedModel,
    name: str,
    sentences: Sequence[tuple[str, ...]],
    options: EvalOptions,
    emit: Emit,
) -> tuple[Tensor, Encoded]:
    encoded = encode(model, sentences, options.max_length, name, emit)

    def logits(batch: Batch) -> Tensor:
        return model.module(**batch).logits  # type: ignore[no-any-return]

    found = forward(model, encoded, logits, batch_size=options.batch_size, name=name, emit=emit)
    return found, encoded


def _similarities(
    model: LoadedModel, name: str, found: GlueSet, options: EvalOptions, emit: Emit
) -> tuple[Tensor, Encoded, tuple[str, ...]]:
    pooling, length = read_pooling(model.path), options.max_length or read_length(model.path)
    body = _body(model)
    sentences = [(sentence,) for pair in found.sentences for sentence in pair]
    encoded = encode(model, sentences, length, name, emit)

    def embed(batch: Batch) -> Tensor:
        return pool(body(**batch).last_hidden_state, batch["attention_mask"], pooling)

    vectors = forward(model, encoded, embed, batch_size=options.batch_size, name=name, emit=emit)
    how = (f"cosine of embeddings, pooling {pooling}, at most {length} tokens",)
    # equal sentences have a cosine of 1 up to the last digits, which must not rank them
    return cosine(vectors[0::2], vectors[1::2]).round(decimals=6), encoded, how


def _body(model: LoadedModel) -> Any:
    """The encoder itself; of a masked language model, what is under its head."""
    if model.kind == "encoder":
        return model.module
    # a packed checkpoint unpacks itself when it is called as a whole, not through its body
    with torch.inference_mode():
        model.module(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device))
    return model.module.base_model


def _results(
    name: str,
    metrics: Sequence[str],
    found: GlueSet,
    predictions: Values,
    encoded: Encoded,
    options: EvalOptions,
    emit: Emit,
    begin: float,
    notes: tuple[str, ...],
) -> list[EvalResult]:
    if is_constant(predictions) and len(predictions) > 1:
        message = (
            f"all {len(predictions)} predictions are the same; a correlation is then given as 0"
        )
        emit(Notice(kind="warning", subject=name, message=message))
        notes = (*notes, message)
    if encoded.truncated:
        notes = (*notes, f"{encoded.truncated} samples cut at {encoded.max_length} tokens")
    labels, seconds = np.array(found.labels, dtype=np.float64), time.perf_counter() - begin
    per_sample = {"accuracy": build_ratios((labels == predictions).astype(int))}
    return [
        EvalResult(
            task=name,
            version=VERSION,
            metric=metric,
            value=METRICS[metric](labels, predictions),
            stderr=standard_error(metric, labels, predictions, options.seed),
            unit=UNITS.get(metric, "correlation"),
            higher_is_better=True,
            samples=len(found),
            seconds=seconds,
            tokens=encoded.tokens,
            data_source=found.origin,
            data_sha256=found.sha256,
            data_fingerprint=found.sha256,
            per_sample=per_sample.get(metric) or build_pairs(labels, predictions),
            notes=(*notes, f"standard error: {error_words(metric)}"),
        )
        for metric in metrics
    ]
