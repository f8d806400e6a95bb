"""Turn text into token batches, with a record that identifies the tokens exactly.

For a causal LM: windows of `seqlen` consecutive tokens of the tokenized text, no padding and no
special tokens (GPTQ's protocol), drawn without overlap by a seeded permutation. For other kinds:
one document per row, truncated at `seqlen` tokens and padded; the attention mask marks real tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cptq.calibration.batches import Batch
from cptq.checkpoint.model import LoadedModel
from cptq.config import CalibrationSettings, ModelSettings
from cptq.data.overlap import build_sketch, encode_sketch
from cptq.data.text import Text, load_text
from cptq.errors import CalibrationError
from cptq.types import CalibrationRecord, Emit, Notice


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


def _drop_seen(model: LoadedModel, seen: Iterable[Tensor], rows: Iterable[Tensor]) -> list[Batch]:
    """Return the rows, one per batch, without those that repeat a calibrating row."""
    known = {tuple(row.tolist()) for row in seen}
    return [_pad_rows(model, [row]) for row in rows if tuple(row.tolist()) not in known]


def _limit_seqlen(model: LoadedModel, asked: int, emit: Emit) -> int:
    most = model.max_positions
    if most is None or asked <= most:
        return asked
    message = f"{asked} tokens requested, the model allows {most}: using {most}"
    emit(Notice(kind="warning", subject="--seqlen", message=message))
    return most


def _cut_windows(
    model: LoadedModel, text: Text, settings: CalibrationSettings, seqlen: int, emit: Emit
) -> list[Tensor]:
    """Return non-overlapping windows in seeded order, each (seqlen,)."""
    ids = _encode(model.tokenizer, text.text)
    windows = list(ids[: len(ids) // seqlen * seqlen].view(-1, seqlen))
    if not windows:
        raise CalibrationError(
            f"{text.origin} gives {len(ids)} tokens, fewer than one sample of {seqlen}",
            hint="pass a smaller --seqlen or a longer text",
        )
    return _draw(windows, settings, emit)


def _tokenize_documents(
    model: LoadedModel, text: Text, settings: CalibrationSettings, seqlen: int, emit: Emit
) -> list[Tensor]:
    """Return one document per row, truncated at `seqlen`, in seeded order."""
    assert model.tokenizer is not None
    specials = model.tokenizer.num_special_tokens_to_add()
    if seqlen <= specials:  # the tokenizer would not truncate at all
        raise CalibrationError(
            f"a row of {seqlen} tokens leaves no room for text beside {specials} special tokens",
            hint=f"pass a --seqlen of at least {specials + 1}",
        )
    chosen = _draw(list(text.rows), settings, emit)
    rows = [model.tokenizer(document, verbose=False)["input_ids"] for document in chosen]
    long = sum(len(row) > seqlen for row in rows)
    if long:
        message = f"{long} of {len(rows)} documents were cut at {seqlen} tokens"
        emit(Notice(kind="info", subject="calibration", message=message))
    cut = [model.tokenizer(d, truncation=True, max_length=seqlen)["input_ids"] for d in chosen]
    return [torch.tensor(row) for row in cut]


def _draw(items: list[Any], settings: CalibrationSettings, emit: Emit) -> list[Any]:
    if len(items) < settings.samples:
        message = f"{settings.samples} samples requested, the text has {len(items)}: all are used"
        emit(Notice(kind="warning", subject="--samples", message=message))
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(items), generator=generator)[: settings.samples]
    return [items[i] for i in order.tolist()]


def _encode(tokenizer: Any, text: str) -> Tensor:
    # the whole text is one sequence on purpose: windows are cut from it later
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def _assemble(
    model: LoadedModel,
    text: Text,
    settings: CalibrationSettings,
    seqlen: int,
    rows: list[Tensor],
) -> Calibration:
    parts = [rows[i : i + settings.batch_size] for i in range(0, len(rows), settings.batch_size)]
    record = CalibrationRecord(
        source=text.source,
        origin=Path(text.origin).name if Path(text.origin).is_absolute() else text.origin,
        samples=len(rows),
        seqlen=seqlen,
        tokens=sum(len(row) for row in rows),
        seed=settings.seed,
        fingerprint=digest_tokens(rows),
        text_sha256=text.sha256,
        notes=tuple(text.notes),
        sketch=encode_sketch(build_sketch(_decode_rows(model, rows))),
    )
    return Calibration(batches=[_pad_rows(model, part) for part in parts], record=record)


def _decode_rows(model: LoadedModel, rows: list[Tensor]) -> list[str]:
    """Return the samples as text."""
    assert model.tokenizer is not None
    decode = model.tokenizer.decode
    return [str(decode(row.tolist(), skip_special_tokens=True)) for row in rows]


def _pad_rows(model: LoadedModel, rows: list[Tensor]) -> Batch:
    """Return rows of any length as one batch, right-padded, on the model's device."""
    longest = max(len(row) for row in rows)
    pad = getattr(model.tokenizer, "pad_token_id", None) or 0
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def digest_tokens(rows: Iterable[Tensor]) -> str:
    """Return the sha256 (hex) of rows of token ids and their lengths."""
    total = hashlib.sha256()
    for row in rows:
        total.update(len(row).to_bytes(8, "little"))
        total.update(row.to(torch.int64).numpy().tobytes())
    return total.hexdigest()
