"""The settings of the commands that run a finished model: `bench` and `generate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cptq.config.inputs import ModelSettings, out_option, overwrite_option
from cptq.config.options import (
    ARGUMENTS,
    EVALUATION,
    EXECUTION,
    GENERATION,
    check_options,
    describe_option,
    option,
)
from cptq.errors import UsageError

#: what a GGUF file's name ends in
GGUF = ".gguf"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """`cptq bench`: the `others` are measured in turns with the first, `model`."""

    model: ModelSettings
    others: tuple[str, ...] = option(
        (),
        "Further models, measured in turns with the first. Each model may be a checkpoint, an "
        "artifact or a .gguf file, which needs llama-cpp-python.",
        ARGUMENTS,
        "MODEL...",
    )
    prompt_tokens: int = option(
        128, "Read a prompt of N random tokens.", EVALUATION, "N", minimum=1
    )
    new_tokens: int = option(
        32,
        "Write N tokens after it. The first counts as reading, the others as decoding.",
        EVALUATION,
        "N",
        minimum=2,
    )
    repeats: int = option(
        5, "Repeat the measurement N times, after a warm-up.", EVALUATION, "N", minimum=1
    )
    batch_size: tuple[int, ...] = option(
        (1, 8),
        "Run N sequences at once; several numbers, separated by commas, are measured one by one.",
        EXECUTION,
        "LIST",
        commas=True,
    )
    threads: int | None = option(
        None,
        "Compute with N threads.",
        EXECUTION,
        "N",
        minimum=1,
        usual="as many as torch chooses",
    )
    seed: int = option(0, "Draw the prompt with this random seed.", EXECUTION, "N", minimum=0)
    out: Path | None = out_option("Write every repetition to this JSON file.", "FILE")
    overwrite: bool = overwrite_option()

    def __post_init__(self) -> None:
        check_options(self)
        wrong = [size for size in self.batch_size if size < 1]
        if wrong or not self.batch_size:
            what = f"holds {wrong[0]}" if wrong else "is empty"
            raise UsageError(
                f"--batch-size {what}", allowed="whole numbers of at least 1, such as 1,8"
            )

    @property
    def sources(self) -> tuple[str, ...]:
        """All models, the first one first."""
        return (self.model.model, *self.others)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSettings:
    """`cptq generate`. Without a `temperature` the most likely token is taken."""

    model: ModelSettings
    prompt: str = field(
        metadata=describe_option(
            "Continue this text. -: read it from the standard input.",
            GENERATION,
            "TEXT",
            verbatim=True,
        )
    )
    max_new_tokens: int = option(64, "Write at most N tokens.", GENERATION, "N", minimum=1)
    chat: bool = option(
        False, "Pass the text as a user's message, in the model's chat template.", GENERATION
    )
    temperature: float | None = option(
        None,
        "Draw tokens, with the logits divided by T. 0: take the most likely token.",
        GENERATION,
        "T",
        usual="0",
    )
    top_p: float | None = option(
        None,
        "Draw from the most likely tokens whose probabilities sum up to P. Needs --temperature.",
        GENERATION,
        "P",
        usual="1",
    )
    seed: int = option(0, "Set the random seed of the draws.", GENERATION, "N", minimum=0)

    def __post_init__(self) -> None:
        check_options(self)
        if not self.prompt:
            raise UsageError("the prompt is empty", hint="type for example --prompt 'Once upon'")
        if self.temperature is not None and not 0 <= self.temperature <= 100:
            raise UsageError(f"--temperature is {self.temperature:g}", allowed="from 0 to 100")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p is {self.top_p:g}", allowed="above 0 and at most 1")
        if self.top_p is not None and not self.temperature:
            raise UsageError(
                "--top-p has no effect without --temperature", hint="add --temperature 1"
            )


RunSettings = BenchSettings | GenerateSettings
