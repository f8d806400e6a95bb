"""Which rows of the calibration batches measure what: some to fit on, some held out.

Language models are held out as short windows from the end of the text, so that a few hundred
tokens still come from several places; encoders and classifiers as whole sentences.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cptq.calibration.objective import real_tokens
from cptq.types import ModelKind

Rows = dict[str, Tensor]

#: tokens that flow through a model at once while it is measured
MICRO_TOKENS = 512
#: about how long the windows are that a language model is held out in
WINDOW = 128
#: tokens held out of a language model's calibration text: fewest, most
HELD_OUT_TOKENS = (128, 1024)
#: weights x held-out tokens that half a forward pass per trial may take on a CPU. On smollm2-135m
#: 128 tokens rank units as 1,024 do (Spearman 0.98 by noise, 0.99 by pruning; 192: 0.99, 0.99)
HELD_OUT_WORK = 17.5e9
#: tokens held out where whole sentences are judged
HELD_OUT_SENTENCE_TOKENS = 1024
#: tokens that must be left for sampling before held-out rows are kept out of it
ENOUGH_TOKENS = 2048


def token_count(batches: Iterable[Mapping[str, Tensor]]) -> int:
    """Number of tokens that are not padding."""
    return sum(int(real_tokens(batch).sum()) for batch in batches)


def micro_batches(batches: Iterable[Rows], tokens: int = MICRO_TOKENS) -> list[Rows]:
    """The same rows in pieces of at most `tokens` positions (one row at least), padding trimmed."""
    pieces = []
    for batch in batches:
        rows = max(1, tokens // batch["input_ids"].shape[1])
        for start in range(0, len(batch["input_ids"]), rows):
            pieces.append(trimmed({k: v[start : start + rows] for k, v in batch.items()}))
    return pieces


def trimmed(batch: Rows) -> Rows:
    """Without the positions that are padding in every row (on the right only)."""
    used = real_tokens(batch).any(0).nonzero()
    length = int(used[-1]) + 1 if len(used) else 1
    return cropped(batch, length)


def cropped(batch: Rows, length: int) -> Rows:
    """The first `length` positions of every row."""
    positions = batch["input_ids"].shape[1]
    return {
        name: value[:, :length] if value.dim() > 1 and value.shape[1] == positions else value
        for name, value in batch.items()
    }


def stacked(rows: Iterable[Rows], tokens: int = MICRO_TOKENS) -> list[Rows]:
    """Consecutive rows as batches of at most `tokens` positions, padded on the right with 0."""
    batches: list[Rows] = []
    group: list[Rows] = []
    for row in rows:
        longest = max(r["input_ids"].shape[1] for r in [*group, row])
        if group and longest * (len(group) + 1) > tokens:
            batches.append(_joined(group))
            group = []
        group.append(row)
    return [*batches, _joined(group)] if group else batches


def _joined(rows: list[Rows]) -> Rows:
    longest = max(row["input_ids"].shape[1] for row in rows)
    padded = [_padded(row, longest) for row in rows]
    return {name: torch.cat([row[name] for row in padded]) for name in padded[0]}


def _padded(row: Rows, length: int) -> Rows:
    positions = row["input_ids"].shape[1]
    row = row | {"attention_mask": real_tokens(row).long()}
    return {
        name: torch.nn.functional.pad(value, (0, length - positions))
        if value.dim() > 1 and value.shape[1] == positions
        else value
        for name, value in row.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """Rows to sample from and rows to hold out, as batches; do they share any?"""

    fit: list[Rows]
    held_out: list[Rows]
    overlap: bool


def held_out_tokens(parameters: int, on_cpu: bool) -> int:
    """How many tokens of a language model to hold out: as many as its trials can afford."""
    fewest, most = HELD_OUT_TOKENS
    affordable = int(HELD_OUT_WORK / max(parameters, 1)) if on_cpu else most
    return min(max(affordable, fewest), most)


def split_held_out(batches: Iterable[Rows], kind: ModelKind, tokens: int) -> Split:
    """Hold out the end of the calibration data.

    Language models give up at most a quarter of their rows, others half: they are judged per
    sentence. Where fewer than `ENOUGH_TOKENS` would be left, the held-out rows are sampled as well.

    Args:
        batches: calibration batches.
        kind: language models are held out as short windows, others as whole sentences.
        tokens: how many to hold out of a language model's text.
    """
    rows = micro_batches(batches, tokens=1)
    language = kind in ("causal-lm", "masked-lm")
    most = max(1, len(rows) // (4 if language else 2))
    held = _windows(rows[-most:], tokens) if language else _sentences(rows[-most:])
    rest = rows[: len(rows) - len(held)]
    overlap = token_count(rest) < ENOUGH_TOKENS
    return Split(fit=stacked(rows if overlap else rest), held_out=stacked(held), overlap=overlap)


def gradient_rows(batches: Iterable[Rows], kind: ModelKind, tokens: int) -> list[Rows]:
    """About `tokens` tokens from the front of the data, from several places, as batches.

    Language models: the beginnings of rows, `WINDOW` tokens of each; others: whole sentences.
    """
    chosen: list[Rows] = []
    for row in micro_batches(batches, tokens=1):
        row = cropped(row, WINDOW) if kind in ("causal-lm", "masked-lm") else row
        if chosen and token_count([*chosen, row]) > tokens:
            break
        chosen.append(row)
    return stacked(chosen)


def _windows(rows: list[Rows], tokens: int) -> list[Rows]:
    chosen = rows[-max(2, tokens // WINDOW) :]
    return [cropped(row, max(2, tokens // len(chosen))) for row in chosen]


def _sentences(rows: list[Rows]) -> list[Rows]:
    chosen: list[Rows] = []
    for row in reversed(rows):
        if chosen and token_count([*chosen, row]) > HELD_OUT_SENTENCE_TOKENS:
            break
        chosen.append(row)
    return chosen[::-1]
