"""Text that judges: rows of the calibration source that calibrate nothing and choose nothing.

A measurement is fitted on one part of a text, chooses by a second and must be judged by a third,
or it is flattered. `Calibration.spare` are rows beyond those that calibrate; here they become parts
of a few hundred to a few thousand tokens: windows of `WINDOW` tokens of a language model (so that
they come from many places), whole sentences for all else.
"""

from __future__ import annotations

from collections.abc import Sequence

from cptq.calibration.batches import WINDOW, Batch, crop_rows, stack_rows
from cptq.checkpoint.model import LoadedModel
from cptq.errors import CalibrationError

#: rows of one part: windows of a language model, sentences of all else
WINDOWS, SENTENCES = 16, 256
#: logits that a part may hold in memory, as float32 numbers
LOGITS = 1e8


def part_rows(model: LoadedModel) -> int:
    """How many rows a part has."""
    if not is_language(model):
        return SENTENCES
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 0) or 1)
    return max(4, min(WINDOWS, int(LOGITS / (vocabulary * WINDOW))))


def is_language(model: LoadedModel) -> bool:
    """Whether the model is judged token by token."""
    return model.kind in ("causal-lm", "masked-lm")


def parts(model: LoadedModel, spare: Sequence[Batch], count: int) -> list[list[Batch]]:
    """The spare rows as `count` parts of batches, as equal as may be.

    Raises:
        CalibrationError: fewer rows than parts.
    """
    if len(spare) < count:
        raise CalibrationError(
            f"the text leaves {len(spare)} samples to judge with, and {count} are needed",
            hint="pass a smaller --seqlen or a longer text",
        )
    rows = [crop_rows(row, WINDOW) for row in spare] if is_language(model) else list(spare)
    return [stack_rows(rows[index::count]) for index in range(count)]
