"""Cut, stack and split token batches: some rows to fit on, some held out.

For language models whole windows from the end of the text are held out, as a model errs otherwise
where it has more context; for encoders and classifiers whole sentences.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cptq.calibration.objective import mask_real_tokens
from cptq.types import ModelKind

#: input_ids, attention_mask and, of pairs, token_type_ids; (rows, positions) each
Batch = dict[str, Tensor]

#: tokens that flow through a model at once while it is measured
MICRO_TOKENS = 512
#: tokens of a row of a language model that gradients are taken on
GRADIENT_WINDOW = 128
#: tokens held out of a language model's calibration text: fewest, most. By noise, one window of 512
#: tokens ranks smollm2-135m's units as four windows do (Spearman 0.95 to 0.97); two windows of 64
#: tokens do not (0.87)
HELD_OUT_TOKENS = (512, 2048)
#: weights x held-out tokens that half a forward pass per trial may take on a CPU
HELD_OUT_WORK = 70e9
#: tokens held out as whole sentences
HELD_OUT_SENTENCE_TOKENS = 1024
#: tokens that must remain for sampling; with fewer, the held-out rows are sampled, too
ENOUGH_TOKENS = 2048


def count_tokens(batches: Iterable[Mapping[str, Tensor]]) -> int:
    """Return the number of tokens that are not padding."""
    return sum(int(mask_real_tokens(batch).sum()) for batch in batches)


def split_batches(batches: Iterable[Batch], tokens: int = MICRO_TOKENS) -> list[Batch]:
    """Split into pieces of at most `tokens` positions (at least one row) and trim the padding."""
    pieces = []
    for batch in batches:
        rows = max(1, tokens // batch["input_ids"].shape[1])
        for start in range(0, len(batch["input_ids"]), rows):
            pieces.append(trim_padding({k: v[start : start + rows] for k, v in batch.items()}))
    return pieces


def trim_padding(batch: Batch) -> Batch:
    """Drop the positions that are padding in every row (on the right only)."""
    used = mask_real_tokens(batch).any(0).nonzero()
    length = int(used[-1]) + 1 if len(used) else 1
    return crop_rows(batch, length)


def crop_rows(batch: Batch, length: int) -> Batch:
    """Return the first `length` positions of every row."""
    positions = batch["input_ids"].shape[1]
    return {
        name: value[:, :length] if value.dim() > 1 and value.shape[1] == positions else value
        for name, value in batch.items()
    }


def stack_rows(rows: Iterable[Batch], tokens: int = MICRO_TOKENS) -> list[Batch]:
    """Stack consecutive rows to batches of at most `tokens` positions, right-padded with 0."""
    batches: list[Batch] = []
    group: list[Batch] = []
    for row in rows:
        longest = max(r["input_ids"].shape[1] for r in [*group, row])
        if group and longest * (len(group) + 1) > tokens:
            batches.append(_concatenate(group))
            group = []
        group.append(row)
    return [*batches, _concatenate(group)] if group else batches


def _concatenate(rows: list[Batch]) -> Batch:
    longest = max(row["input_ids"].shape[1] for row in rows)
    padded = [_pad_row(row, longest) for row in rows]
    return {name: torch.cat([row[name] for row in padded]) for name in padded[0]}


def _pad_row(row: Batch, length: int) -> Batch:
    positions = row["input_ids"].shape[1]
    row = row | {"attention_mask": mask_real_tokens(row).long()}
    return {
        name: torch.nn.functional.pad(value, (0, length - positions))
        if value.dim() > 1 and value.shape[1] == positions
        else value
        for name, value in row.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """Rows to sample from and rows to hold out, as batches; `overlap`: they share rows."""

    fit: list[Batch]
    held_out: list[Batch]
    overlap: bool


def choose_held_out_tokens(parameters: int, on_cpu: bool) -> int:
    """Return how many tokens of a language model to hold out: as many as its trials can afford."""
    fewest, most = HELD_OUT_TOKENS
    affordable = int(HELD_OUT_WORK / max(parameters, 1)) if on_cpu else most
    return min(max(affordable, fewest), most)


def split_held_out(batches: Iterable[Batch], kind: ModelKind, tokens: int) -> Split:
    """Hold out the end of the calibration data.

    At most a quarter of the rows of a language model, half of any other's, which is judged per
    sentence. If fewer than `ENOUGH_TOKENS` would remain, the held-out rows are sampled as well.

    Args:
        batches: calibration batches.
        kind: windows are held out for language models, whole sentences for others.
        tokens: how many to hold out of a language model's text.
    """
    rows = split_batches(batches, tokens=1)
    language = kind in ("causal-lm", "masked-lm")
    most = max(1, len(rows) // (4 if language else 2))
    held = _select_windows(rows[-most:], tokens) if language else _select_sentences(rows[-most:])
    rest = rows[: len(rows) - len(held)]
    overlap = count_tokens(rest) < ENOUGH_TOKENS
    return Split(
        fit=stack_rows(rows if overlap else rest), held_out=stack_rows(held), overlap=overlap
    )


def select_gradient_rows(batches: Iterable[Batch], kind: ModelKind, tokens: int) -> list[Batch]:
    """Return about `tokens` tokens from the front of the data, from several places, as batches.

    Language models: the first `GRADIENT_WINDOW` tokens of rows; others: whole sentences.
    """
    chosen: list[Batch] = []
    for row in split_batches(batches, tokens=1):
        row = crop_rows(row, GRADIENT_WINDOW) if kind in ("causal-lm", "masked-lm") else row
        if chosen and count_tokens([*chosen, row]) > tokens:
            break
        chosen.append(row)
    return stack_rows(chosen)


def _select_windows(rows: list[Batch], tokens: int) -> list[Batch]:
    longest = max(row["input_ids"].shape[1] for row in rows)
    return [crop_rows(row, tokens) for row in rows[-max(1, tokens // longest) :]]


def _select_sentences(rows: list[Batch]) -> list[Batch]:
    chosen: list[Batch] = []
    for row in reversed(rows):
        if chosen and count_tokens([*chosen, row]) > HELD_OUT_SENTENCE_TOKENS:
            break
        chosen.append(row)
    return chosen[::-1]
