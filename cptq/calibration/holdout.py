"""Held-out text: rows of the calibration source that neither calibrate nor choose.

A measurement that is fitted on one part of a text and chooses by a second must be evaluated on a
third, or it looks better than it is. `Calibration.held_out` are the rows after those that
calibrate; here they become parts of a few hundred to a few thousand tokens: windows of `WINDOW`
tokens for a language model (so that they come from many places), whole sentences for other models.
"""

from __future__ import annotations

from collections.abc import Sequence

from cptq.calibration.batches import WINDOW, Batch, crop_rows, stack_rows
from cptq.checkpoint.model import LoadedModel
from cptq.errors import CalibrationError

#: rows of one part: windows of a language model, sentences of other models
WINDOWS, SENTENCES = 16, 256
#: logits that a part may hold in memory, as float32 numbers
LOGITS = 1e8


def count_part_rows(model: LoadedModel) -> int:
    """Return how many rows a part has."""
    if not _is_language_model(model):
        return SENTENCES
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 0) or 1)
    return max(4, min(WINDOWS, int(LOGITS / (vocabulary * WINDOW))))


def split_parts(model: LoadedModel, held_out: Sequence[Batch], count: int) -> list[list[Batch]]:
    """Split held-out rows into `count` parts of batches, as equal as possible.

    Raises:
        CalibrationError: there are fewer rows than parts.
    """
    if len(held_out) < count:
        raise CalibrationError(
            f"the text leaves {len(held_out)} samples to judge with, and {count} are needed",
            hint="pass a smaller --seqlen or a longer text",
        )
    language = _is_language_model(model)
    rows = [crop_rows(row, WINDOW) for row in held_out] if language else list(held_out)
    return [stack_rows(rows[index::count]) for index in range(count)]


def _is_language_model(model: LoadedModel) -> bool:
    """Return whether the model is evaluated token by token."""
    return model.kind in ("causal-lm", "masked-lm")
