"""Held-out text: rows of the calibration source that neither calibrate nor choose.

A measurement that is fitted on one part of a text and chooses by a second must be evaluated on a
third, or it looks better than it is. `Calibration.held_out` are the rows after those that
calibrate; here they become parts: whole windows for a language model, as late positions, which read
more context, differ from early ones (KL 0.56 nats over positions 0 to 511, 0.69 over 0 to 127, for
a model at 3 bits); whole sentences for other models.
"""

from __future__ import annotations

from collections.abc import Sequence

from cptq.calibration.batches import Batch, stack_rows
from cptq.checkpoint.model import LoadedModel
from cptq.errors import CalibrationError

#: tokens of one part of a language model's text, and the fewest and most windows that hold them
TOKENS, WINDOWS = 2048, (4, 32)
#: sentences of one part of any other model's
SENTENCES = 256


def count_part_rows(model: LoadedModel, seqlen: int) -> int:
    """Return how many rows, of up to `seqlen` tokens, a part has."""
    if model.kind not in ("causal-lm", "masked-lm"):
        return SENTENCES
    return min(max(TOKENS // seqlen, WINDOWS[0]), WINDOWS[1])


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
    return [stack_rows(held_out[index::count]) for index in range(count)]
