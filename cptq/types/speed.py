"""How fast models run, and how large they are in memory."""

from __future__ import annotations

import statistics
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of a model with all its repetitions, in the order in which they were made.

    `batch_size` is None where the figure has none. Load time, first token and memory are measured
    once: a process is fresh once.
    """

    name: str
    values: tuple[float, ...]
    batch_size: int | None = None

    @property
    def median(self) -> float:
        """The value that is reported."""
        return statistics.median(self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpeed:
    """A model as it runs.

    Attributes:
        name: which model, and what opened it.
        weight_bytes: of its parameters and buffers in memory, tied ones once.
        way: what computed: "generate", "own loop" or "forward pass"; empty: nothing was timed.
        figures: "prefill" and "decode" in tokens, or "forward" in sentences, per second.
    """

    name: str
    weight_bytes: int
    way: str = ""
    figures: tuple[Figure, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedReport:
    """What `compress` measures of the dense model and of its artifact at the end.

    Attributes:
        command: measures it anew, in fresh processes, with load times and resident memory.
        models: the dense model first; empty where nothing could be measured.
        why: of what is not there: the reason.
        prompt_tokens, new_tokens: lengths of one run; one sequence at a time.
        threads, device, dtype: it ran with.
    """

    command: str
    models: tuple[ModelSpeed, ...] = ()
    why: str = ""
    prompt_tokens: int = 0
    new_tokens: int = 0
    threads: int = 0
    device: str = ""
    dtype: str = ""
