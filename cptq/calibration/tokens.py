"""Turn text into token batches, with a record that identifies the tokens exactly.

For a causal LM: windows of `seqlen` consecutive tokens of the tokenized text, drawn without overlap
by a seeded permutation. Where the tokenizer puts a BOS before a text (`find_bos`), every window is
the BOS and seqlen - 1 tokens: a model that was trained with it has other activations without it.
Where it adds none these are GPTQ's windows. Other special tokens are left out.

Documents are joined to one text by default, as GPTQ's are, so that windows cross their borders.
`documents="apart"` tokenises each by itself and cuts it into windows. The rest of a document is a
shorter row; below SHORTEST tokens, where most tokens would have hardly any context, it is dropped
and counted in a Notice. Rows of unequal length are never in one batch: no row has padding, which
would reach the experts of a mixture.

For other kinds: one document per row with the tokenizer's special tokens, truncated at `seqlen`
tokens and padded; the attention mask marks real tokens. Where the text is a GLUE task of pairs and
the model a classifier, a row is a pair, encoded as it is evaluated, with its token types where the
model takes them. Sentence encoders embed each sentence alone, so they get single sentences.

Limits: windows that are cut from an article begin in the middle of a sentence.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cptq.calibration.batches import Batch
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.special_tokens import find_bos
from cptq.checkpoint.tokenizer import check_token_ids
from cptq.config import CalibrationSettings, ModelSettings
from cptq.data.overlap import build_sketch, encode_sketch
from cptq.data.text import Text, load_text
from cptq.errors import CalibrationError
from cptq.types import CalibrationRecord, Emit, Notice

#: tokens of the shortest row that is cut from a document apart
SHORTEST = 32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """One sample: the model's inputs by name, (tokens,) each, and the sentences of a pair."""

    inputs: Mapping[str, Tensor]
    sentences: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])

    @property
    def key(self) -> tuple[tuple[int, ...], ...]:
        """What equal samples share."""
        return tuple(tuple(value.tolist()) for value in self.inputs.values())


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """Token batches on the model's device, and what they are.

    `held_out` are rows of the same text that do not calibrate, as batches of one row each.
    """

    batches: list[Batch]
    record: CalibrationRecord
    held_out: list[Batch] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Real (unpadded) tokens."""
        return self.record.tokens


def build_calibration(
    model: LoadedModel,
    settings: CalibrationSettings,
    model_settings: ModelSettings,
    emit: Emit,
    *,
    held_out: int = 0,
    reserve: bool = True,
) -> Calibration:
    """Load, tokenise and batch the calibration text.

    Args:
        held_out: rows to hold out. They come after the `samples` in the same seeded order, so that
            with enough text they do not change which rows calibrate.
        reserve: where the text is short, let fewer samples calibrate; otherwise fewer rows are
            held out, or none.

    Raises:
        DataError: the text is missing or empty.
        CalibrationError: the model has no tokenizer, or the text is too short for one sample.
        ModelError: the tokenizer gives ids that the model has no embedding for.
    """
    if model.tokenizer is None:
        raise CalibrationError(
            f"{model.source} has no tokenizer, so no text can be turned into tokens",
            hint="put tokenizer.json and tokenizer_config.json beside config.json",
        )
    text = load_text(
        settings.calibration,
        "calibration",
        data_dir=settings.data_dir,
        cache_dir=model_settings.cache_dir,
        token=model_settings.token,
    )
    for note in text.notes:
        emit(Notice(kind="info", subject="calibration", message=note))
    seqlen = _limit_seqlen(model, settings.seqlen, emit)
    wanted = replace(settings, samples=settings.samples + held_out)
    rows = (_cut_windows if model.kind == "causal-lm" else _tokenize_documents)(
        model, text, wanted, seqlen, emit
    )
    check_token_ids(model, (row.inputs["input_ids"] for row in rows))
    _choose_padding(model, rows, emit)
    count = count_calibrating(len(rows), settings.samples, held_out if reserve else 0)
    if count < min(settings.samples, len(rows)):
        message = (
            f"the text has {len(rows)} samples: {len(rows) - count} of them are kept apart to "
            f"judge, {count} calibrate instead of {settings.samples}"
        )
        emit(Notice(kind="warning", subject="--samples", message=message))
    calibration = _assemble(model, text, settings, seqlen, rows[:count])
    return replace(calibration, held_out=_drop_seen(model, rows[:count], rows[count:]))


def count_calibrating(rows: int, samples: int, held_out: int) -> int:
    """Return how many rows calibrate; where text is short, at least a quarter is held out.

    Raises:
        CalibrationError: rows are to be held out and there are not two rows.
    """
    if not held_out:
        return min(rows, samples)
    if rows < 2:
        raise CalibrationError(
            "the text gives one sample, and none is left to judge with",
            hint="pass a smaller --seqlen or a longer text",
        )
    kept = min(held_out, max(rows - samples, rows // 4, 1))
    return min(samples, rows - kept)


def _choose_padding(model: LoadedModel, rows: Sequence[Row], emit: Emit) -> None:
    """Let a classifier without a padding token run batches, padded with the token 0.

    Such a model (Llama's) judges a row at its last token that is not padding; without a padding
    token it takes single rows only. Only the settings in memory are changed.

    Raises:
        CalibrationError: a row ends in the token 0.
    """
    if model.kind != "classifier" or model.config.pad_token_id is not None:
        return
    if any(int(row.inputs["input_ids"][-1]) == 0 for row in rows):
        raise CalibrationError(
            f"the config.json of {model.source} has no pad_token_id, and rows of the calibration "
            "text end in the token 0, which would stand for padding",
            hint="set pad_token_id in config.json",
        )
    model.config.pad_token_id = 0
    message = "the classifier has no padding token: rows are padded with token 0 and masked"
    emit(Notice(kind="fallback", subject="calibration", message=message))


def _drop_seen(model: LoadedModel, seen: Iterable[Row], rows: Iterable[Row]) -> list[Batch]:
    """Return the rows, one per batch, without those that repeat a calibrating row."""
    known = {row.key for row in seen}
    return [_pad_rows(model, [row]) for row in rows if row.key not in known]


def _limit_seqlen(model: LoadedModel, asked: int, emit: Emit) -> int:
    most = model.max_positions
    if most is None or asked <= most:
        return asked
    message = f"{asked} tokens requested, the model allows {most}: using {most}"
    emit(Notice(kind="warning", subject="--seqlen", message=message))
    return most


def _cut_windows(
    model: LoadedModel, text: Text, settings: CalibrationSettings, seqlen: int, emit: Emit
) -> list[Row]:
    """Return non-overlapping windows in seeded order, each with its BOS at most `seqlen` tokens."""
    bos = find_bos(model.tokenizer)
    first = torch.tensor([] if bos is None else [bos], dtype=torch.long)
    room = seqlen - len(first)
    if room < 1:
        raise CalibrationError(
            f"a window of {seqlen} tokens leaves no room for text beside the BOS",
            hint="pass a --seqlen of at least 2",
        )
    if settings.documents == "apart":
        windows = _cut_apart(model.tokenizer, text, room, emit)
    else:
        windows = _cut_joined(model.tokenizer, text, room)
    chosen = _draw(windows, settings, emit)
    return [Row(inputs={"input_ids": torch.cat([first, window])}) for window in chosen]


def _cut_joined(tokenizer: Any, text: Text, room: int) -> list[Tensor]:
    """Cut the whole text into windows of `room` tokens, the rest dropped."""
    # the whole text is one sequence on purpose
    (ids,) = _encode(tokenizer, [text.text])
    windows = list(ids[: len(ids) // room * room].view(-1, room))
    if not windows:
        raise CalibrationError(
            f"{text.origin} gives {len(ids)} tokens, fewer than one sample of {room}",
            hint="pass a smaller --seqlen or a longer text",
        )
    return windows


def _cut_apart(tokenizer: Any, text: Text, room: int, emit: Emit) -> list[Tensor]:
    """Cut every document into windows of at most `room` tokens; short rests are dropped."""
    documents = [ids for ids in _encode(tokenizer, text.articles) if len(ids)]
    pieces = [piece for ids in documents for piece in ids.split(room)]
    least = min(SHORTEST, room)
    kept = [piece for piece in pieces if len(piece) >= least]
    if not kept:
        raise CalibrationError(
            f"none of the {len(documents)} documents of {text.origin} has {least} tokens",
            hint="pass --documents joined, or a smaller --seqlen",
        )
    if len(kept) < len(pieces):
        message = (
            f"{len(pieces) - len(kept)} documents or ends of documents with fewer than {least} "
            f"tokens were dropped, {len(kept)} windows of {len(documents)} documents are left"
        )
        emit(Notice(kind="info", subject="--documents", message=message))
    return kept


def _tokenize_documents(
    model: LoadedModel, text: Text, settings: CalibrationSettings, seqlen: int, emit: Emit
) -> list[Row]:
    """Return one document, or one pair, per row, truncated at `seqlen`, in seeded order."""
    if settings.documents == "apart":
        message = f"every row of this model ({model.kind}) is one document: nothing to keep apart"
        emit(Notice(kind="info", subject="--documents", message=message))
    tokenizer: Any = model.tokenizer
    pairs = _takes_pairs(model, text)
    specials = tokenizer.num_special_tokens_to_add(pair=pairs)
    if seqlen <= specials:  # the tokenizer would not truncate at all
        raise CalibrationError(
            f"a row of {seqlen} tokens leaves no room for text beside {specials} special tokens",
            hint=f"pass a --seqlen of at least {specials + 1}",
        )
    documents = text.pairs if pairs else [(row,) for row in text.rows]
    chosen = _draw(list(documents), settings, emit)
    long = sum(len(tokenizer(*texts, verbose=False)["input_ids"]) > seqlen for texts in chosen)
    if long:
        what = "pairs" if pairs else "documents"
        message = f"{long} of {len(chosen)} {what} were cut at {seqlen} tokens"
        emit(Notice(kind="info", subject="calibration", message=message))
    names = _list_inputs(model, pairs)
    found = [(tokenizer(*texts, truncation=True, max_length=seqlen), texts) for texts in chosen]
    return [
        Row(
            inputs={name: torch.tensor(row[name]) for name in names if name in row},
            sentences=texts if pairs else (),
        )
        for row, texts in found
    ]


def _takes_pairs(model: LoadedModel, text: Text) -> bool:
    """Whether rows are pairs: only classifiers see both sentences at once."""
    return bool(text.pairs) and model.kind == "classifier"


def _list_inputs(model: LoadedModel, pairs: bool) -> list[str]:
    """List what a row holds; token types of a single sentence are 0, which is the default."""
    accepted = inspect.signature(model.module.forward).parameters
    return ["input_ids", *(name for name in ("token_type_ids",) if pairs and name in accepted)]


def _draw(items: list[Any], settings: CalibrationSettings, emit: Emit) -> list[Any]:
    if len(items) < settings.samples:
        message = f"{settings.samples} samples requested, the text has {len(items)}: all are used"
        emit(Notice(kind="warning", subject="--samples", message=message))
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(items), generator=generator)[: settings.samples]
    return [items[i] for i in order.tolist()]


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[Tensor]:
    """Return the token ids of each text, without special tokens."""
    found = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [torch.tensor(ids, dtype=torch.long) for ids in found]


def _assemble(
    model: LoadedModel,
    text: Text,
    settings: CalibrationSettings,
    seqlen: int,
    rows: list[Row],
) -> Calibration:
    language = model.kind == "causal-lm"
    record = CalibrationRecord(
        source=text.source,
        origin=Path(text.origin).name if Path(text.origin).is_absolute() else text.origin,
        samples=len(rows),
        seqlen=seqlen,
        tokens=sum(len(row) for row in rows),
        seed=settings.seed,
        fingerprint=digest_tokens(value for row in rows for value in row.inputs.values()),
        text_sha256=text.sha256,
        notes=tuple(text.notes),
        sketch=encode_sketch(build_sketch(_list_texts(model, rows))),
        bos=language and find_bos(model.tokenizer) is not None,
        documents=settings.documents if language else None,
        pairs=_takes_pairs(model, text),
    )
    parts = _group_rows(rows, settings.batch_size, equal=language)
    return Calibration(batches=[_pad_rows(model, part) for part in parts], record=record)


def _group_rows(rows: Iterable[Row], size: int, *, equal: bool) -> list[list[Row]]:
    """Group consecutive rows, at most `size`, where `equal` only those of one length."""
    groups: list[list[Row]] = []
    for row in rows:
        group = groups[-1] if groups else []
        if not group or len(group) == size or (equal and len(group[0]) != len(row)):
            groups.append([row])
        else:
            group.append(row)
    return groups


def _list_texts(model: LoadedModel, rows: Iterable[Row]) -> list[str]:
    """Return the samples as text; both sentences of a pair, whole, since each may leak."""
    tokenizer: Any = model.tokenizer
    texts: list[str] = []
    for row in rows:
        ids = row.inputs["input_ids"].tolist()
        texts += row.sentences or [str(tokenizer.decode(ids, skip_special_tokens=True))]
    return texts


def _pad_rows(model: LoadedModel, rows: Sequence[Row]) -> Batch:
    """Return rows of any length as one batch, right-padded, on the model's device."""
    longest, device = max(map(len, rows)), model.device
    fills = {"input_ids": getattr(model.tokenizer, "pad_token_id", None) or 0}
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    padded = {
        name: torch.stack([_pad(row.inputs[name], longest, fills.get(name, 0)) for row in rows])
        for name in rows[0].inputs
    }
    return {name: value.to(device) for name, value in padded.items()} | {
        "attention_mask": mask.to(device)
    }


def _pad(values: Tensor, length: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - len(values)), value=fill)


def digest_tokens(rows: Iterable[Tensor]) -> str:
    """Return the sha256 (hex) of rows of token ids and their lengths."""
    total = hashlib.sha256()
    for row in rows:
        total.update(len(row).to_bytes(8, "little"))
        total.update(row.to(torch.int64).numpy().tobytes())
    return total.hexdigest()
