"""The settings of the commands that run a model: `eval`, `compare`, `bench`, `generate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cptq.config.checks import check_limit, parse_max_memory
from cptq.config.inputs import (
    DEFAULT_TASKS,
    ModelSettings,
    batch_size_option,
    data_dir_option,
    max_memory_option,
    out_option,
    overwrite_option,
    seed_option,
    tasks_option,
)
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
#: ending of an output of `eval` that is one file; any other name is a directory of reports
RESULT_FILE = ".json"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """What `eval` and `compare` share: a model, and tasks with their data."""

    model: ModelSettings
    tasks: tuple[str, ...] = tasks_option(DEFAULT_TASKS)
    limit: float | None = option(
        None,
        "Evaluate N samples per task, or a share of them if N is at most 1.",
        EVALUATION,
        "N",
        usual="all samples",
    )
    seqlen: int | None = option(
        None,
        "Measure perplexity in windows of N tokens.",
        EVALUATION,
        "N",
        minimum=2,
        usual="2048, or what the model takes",
    )
    bos: str = option(
        "every",
        "Begin every window of perplexity, or only the first, with the BOS where the tokenizer "
        "adds one. first: the protocol of the GPTQ repository.",
        EVALUATION,
        "WINDOWS",
        choices=("every", "first"),
    )
    activations: str = option(
        "exact",
        "Multiply packed weights with activations as they are, or rounded to 8 bits, as generate "
        "and bench do. exact: what compression cost in any runtime.",
        EVALUATION,
        "KIND",
        choices=("exact", "8bit"),
    )
    batch_size: int = batch_size_option()
    max_memory: str | None = max_memory_option()
    data_dir: Path | None = data_dir_option()
    seed: int = seed_option()
    strict: bool = option(
        False,
        "Refuse to evaluate an artifact on its own calibration text, instead of warning.",
        EVALUATION,
    )

    def __post_init__(self) -> None:
        check_options(self)
        check_limit(self.limit)
        parse_max_memory(self.max_memory)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings(EvaluationSettings):
    """`cptq eval`. Without tasks it runs wikitext, unless `lm_eval` names tasks."""

    tasks: tuple[str, ...] = tasks_option(())
    lm_eval: tuple[str, ...] = option(
        (),
        "Run these tasks by lm-evaluation-harness: its names or YAML files, separated by commas.",
        EVALUATION,
        "TASKS",
        commas=True,
    )
    baseline: str | None = option(
        None, "Evaluate this model too and report the differences.", EVALUATION, "MODEL"
    )
    stride: int | None = option(
        None,
        "Move the windows of perplexity by N tokens and score only those.",
        EVALUATION,
        "N",
        minimum=1,
        usual="windows side by side",
    )
    out: Path | None = out_option(
        "Write the results to this directory as a page, Markdown and JSON; where the name ends in "
        ".json, to that file alone.",
        "DIR|FILE",
    )
    overwrite: bool = overwrite_option()

    def __post_init__(self) -> None:
        EvaluationSettings.__post_init__(self)
        if not self.tasks and not self.lm_eval:
            object.__setattr__(self, "tasks", DEFAULT_TASKS)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareSettings(EvaluationSettings):
    """`cptq compare`: the `others` are compared with the first, `model`."""

    others: tuple[str, ...] = option(
        (),
        "The models to compare with it. Each model may also be an artifact, or the JSON file of "
        "cptq eval -o, which is not measured again.",
        ARGUMENTS,
        "MODEL...",
    )
    no_footprint: bool = option(False, "Do not measure speed and memory.", EVALUATION)
    out: Path | None = out_option(
        "Write a web page, a plot of size against quality, and the numbers to this directory."
    )
    overwrite: bool = overwrite_option()

    def __post_init__(self) -> None:
        EvaluationSettings.__post_init__(self)
        if not self.tasks:
            raise UsageError("no task is given", hint="type for example --task wikitext")
        if not self.others:
            raise UsageError("only one model is given", hint="name two models or more")
        if len(set(self.sources)) < len(self.sources):
            raise UsageError("a model is given twice", hint="name each model once")

    @property
    def sources(self) -> tuple[str, ...]:
        """All models, the first one first."""
        return (self.model.model, *self.others)


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
    seed: int = seed_option("Draw the prompt with this random seed.")
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
    seed: int = seed_option("Set the random seed of the draws.", GENERATION)

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
