"""GLUE's nine tasks on their dev parts, and the diagnostic set AX, by GLUE's own metrics.

Sequence classifiers answer with their logits: the label of the greatest one, or for STS-B the one
score. Sentence encoders answer STS-B with the cosine of two embeddings
(`cptq.evaluation.sentences`). Two sentences are given to the tokenizer as a pair, so that it puts
its own separator between them.

MNLI's two dev parts are two tasks, `glue/mnli` (matched) and `glue/mnli-mm`; `glue/stsb-test` is
the labelled test part of STS-B. Source: Wang et al. 2018, table 1; AX is measured by Matthews
correlation over its three classes.

Which output of a classifier is which label is read from the names in `config.id2label`, so that a
model whose outputs are in another order is evaluated correctly.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cptq.checkpoint.model import LoadedModel, ModelSpec
from cptq.data import GlueSet, load_glue
from cptq.errors import EvaluationError
from cptq.evaluation.metrics import (
    METRICS,
    Values,
    describe_standard_error,
    estimate_standard_error,
    is_constant,
)
from cptq.evaluation.sentences import (
    Batch,
    Encoded,
    Pooling,
    compute_cosine,
    encode_sentences,
    pool,
    read_max_length,
    read_pooling,
    run_batches,
)
from cptq.evaluation.task import EvalOptions
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
_ENTAILED = ("entailment", "entailed")
_NOT_ENTAILED = ("not_entailment", "not_entailed", "non_entailment")
_NLI = (_ENTAILED, ("neutral",), ("contradiction", "contradictory"))
#: the names of labels and other spellings of them, by their place in the task
SYNONYMS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "glue/sst2": (("negative", "neg"), ("positive", "pos")),
    "glue/cola": (
        ("unacceptable", "not_acceptable", "ungrammatical"),
        ("acceptable", "grammatical"),
    ),
    "glue/mrpc": (
        ("not_equivalent", "not_paraphrase", "non_paraphrase"),
        ("equivalent", "paraphrase"),
    ),
    "glue/qqp": (
        ("not_duplicate", "non_duplicate", "not_equivalent"),
        ("duplicate", "is_duplicate", "equivalent"),
    ),
    "glue/mnli": _NLI,
    "glue/mnli-mm": _NLI,
    "glue/qnli": (_ENTAILED, _NOT_ENTAILED),
    "glue/rte": (_ENTAILED, _NOT_ENTAILED),
    "glue/wnli": (_NOT_ENTAILED, _ENTAILED),
    "glue/ax": _NLI,
}
_UNNAMED = re.compile(r"(label_?)?\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedGlue:
    """Labelled sentences, tokenised, and how the model's outputs become predictions.

    A classifier's outputs stand for the labels `order`; with a `pooling` predictions are cosines of
    embeddings, the rows being the two sentences of each pair in turn; else they are the one score.
    """

    name: str
    found: GlueSet
    encoded: Encoded
    metrics: tuple[str, ...]
    order: tuple[int, ...] = ()
    pooling: Pooling | None = None
    notes: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of sentences and labels."""
        return self.found.sha256

    @property
    def documents(self) -> Mapping[str, Sequence[str]]:
        """All sentences."""
        return {self.name: tuple(text for texts in self.found.sentences for text in texts)}

    def measure(self, model: LoadedModel, options: EvalOptions, emit: Emit) -> list[EvalResult]:
        """Predict all labels or scores and compute the task's metrics.

        Raises:
            EvaluationError: an output is not finite.
        """
        begin = time.perf_counter()
        predictions = self._predict(model, options, emit)
        notes = self.notes
        if is_constant(predictions) and len(predictions) > 1:
            message = (
                f"all {len(predictions)} predictions are the same; a correlation is then given as 0"
            )
            emit(Notice(kind="warning", subject=self.name, message=message))
            notes = (*notes, message)
        if self.encoded.truncated:
            cut = f"{self.encoded.truncated} samples cut at {self.encoded.max_length} tokens"
            notes = (*notes, cut)
        labels = np.array(self.found.labels, dtype=np.float64)
        seconds = time.perf_counter() - begin
        per_sample = {"accuracy": build_ratios((labels == predictions).astype(int))}
        return [
            EvalResult(
                task=self.name,
                version=VERSION,
                metric=metric,
                value=METRICS[metric](labels, predictions),
                stderr=estimate_standard_error(metric, labels, predictions, options.seed),
                unit=UNITS.get(metric, "correlation"),
                higher_is_better=True,
                samples=len(self.found),
                seconds=seconds,
                tokens=self.encoded.tokens,
                data_source=self.found.origin,
                data_sha256=self.found.sha256,
                data_fingerprint=self.fingerprint,
                per_sample=per_sample.get(metric) or build_pairs(labels, predictions),
                notes=(*notes, f"standard error: {describe_standard_error(metric)}"),
            )
            for metric in self.metrics
        ]

    def _predict(self, model: LoadedModel, options: EvalOptions, emit: Emit) -> Values:
        compute = _read_logits(model) if self.pooling is None else _embed(model, self.pooling)
        outputs_NC = run_batches(
            model,
            self.encoded,
            compute,
            batch_size=options.batch_size,
            name=self.name,
            emit=emit,
        )
        if self.order:
            return np.take(np.array(self.order, dtype=np.float64), outputs_NC.argmax(1).numpy())
        if self.pooling is None:
            scores_N = outputs_NC[:, 0].double()
        else:
            # equal sentences have a cosine of 1 up to the last digits, which must not rank them
            scores_N = compute_cosine(outputs_NC[0::2], outputs_NC[1::2]).round(decimals=6)
        return np.asarray(scores_N.numpy())


def prepare_glue(spec: ModelSpec, name: str, options: EvalOptions, emit: Emit) -> PreparedGlue:
    """Read and tokenise the sentences of a task, and match the classifier's labels with its own.

    Raises:
        EvaluationError: the classifier's labels are not the task's, or no tokenizer.
        DataError: the data is missing, empty or malformed.
    """
    found = _load(name, options, emit)
    if spec.kind != "classifier":
        return _prepare_cosine(spec, name, found, options, emit)
    order: tuple[int, ...] = ()
    if found.label_names:
        order = tuple(match_labels(spec.config, name, found.label_names, emit))
    else:
        require_score(spec.config, name)
    return PreparedGlue(
        name=name,
        found=found,
        encoded=encode_sentences(spec, found.sentences, options.max_length, name, emit),
        metrics=REPORTED[name],
        order=order,
    )


def _prepare_cosine(
    spec: ModelSpec, name: str, found: GlueSet, options: EvalOptions, emit: Emit
) -> PreparedGlue:
    """Tokenise both sentences of each pair by themselves, to compare their embeddings."""
    pooling, length = read_pooling(spec.path), options.max_length or read_max_length(spec.path)
    sentences = [(sentence,) for pair in found.sentences for sentence in pair]
    return PreparedGlue(
        name=name,
        found=found,
        encoded=encode_sentences(spec, sentences, length, name, emit),
        metrics=REPORTED[name][::-1],  # embeddings are judged by ranks
        pooling=pooling,
        notes=(f"cosine of embeddings, pooling {pooling}, at most {length} tokens",),
    )


def _load(name: str, options: EvalOptions, emit: Emit) -> GlueSet:
    found = load_glue(
        name.removeprefix("glue/").removesuffix("-test"),
        "test" if name.endswith("-test") else "dev",
        data_dir=options.data_dir,
        cache_dir=options.cache_dir,
        token=options.token,
    )
    for note in found.notes:
        emit(Notice(kind="skipped", subject=name, message=note))
    return found.first(options.count(len(found)))


def _read_logits(model: LoadedModel) -> Any:
    def compute(batch: Batch) -> Tensor:
        return model.module(**batch).logits  # type: ignore[no-any-return]

    return compute


def _embed(model: LoadedModel, pooling: Pooling) -> Any:
    body = _find_body(model)

    def compute(batch: Batch) -> Tensor:
        return pool(body(**batch).last_hidden_state, batch["attention_mask"], pooling)

    return compute


def _find_body(model: LoadedModel) -> Any:
    """The encoder itself; of a masked language model, what is under its head."""
    if model.kind == "encoder":
        return model.module
    # a packed checkpoint unpacks itself when it is called as a whole, not through its body
    with torch.inference_mode():
        model.module(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device))
    return model.module.base_model


def match_labels(config: Any, task: str, label_names: Sequence[str], emit: Emit) -> list[int]:
    """Match each output of the model with the label of the task that it stands for.

    The names in `config.id2label` decide. Names such as LABEL_0 carry no meaning; they are taken in
    the task's order (a Notice).

    Raises:
        EvaluationError: another number of outputs, or names that are not the task's.
    """
    names = [str(config.id2label[i]) for i in range(int(config.num_labels))]
    wanted = ", ".join(label_names)
    if len(names) != len(label_names):
        raise EvaluationError(
            f"the classifier has {len(names)} labels ({', '.join(names[:8])})",
            allowed=f"{len(label_names)} for {task} ({wanted})",
        )
    if all(_UNNAMED.fullmatch(name.lower()) for name in names):
        message = f"the labels {', '.join(names)} are taken for {wanted}, in this order"
        emit(Notice(kind="warning", subject=task, message=message))
        return list(range(len(names)))
    return _match_by_name(names, task, wanted)


def _match_by_name(names: list[str], task: str, wanted: str) -> list[int]:
    places = {name: place for place, spellings in enumerate(SYNONYMS[task]) for name in spellings}
    order = [places.get(re.sub(r"[\s-]+", "_", name.strip().lower()), -1) for name in names]
    if sorted(order) != list(range(len(names))):
        raise EvaluationError(
            f"the classifier's labels are {', '.join(names)}", allowed=f"{wanted} for {task}"
        )
    return order


def require_score(config: Any, task: str) -> None:
    """Refuse a classifier that does not give one number.

    Raises:
        EvaluationError: it has more outputs.
    """
    if int(config.num_labels) != 1:
        raise EvaluationError(
            f"the classifier has {config.num_labels} outputs",
            allowed=f"one, the score, for {task}",
        )
