"""What several commands take: the model, the calibration text, and options that they share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cptq.config.checks import DEVICES, check_device
from cptq.config.options import (
    ACCESS,
    ARGUMENTS,
    CALIBRATION,
    EVALUATION,
    EXECUTION,
    OUTPUT,
    check_options,
    describe_option,
    option,
)
from cptq.errors import UsageError

#: what torch, NumPy and a signed 64-bit integer all take
MOST_SEED = 2**63 - 1
DTYPES = ("auto", "float32", "bfloat16", "float16")
#: of --max-shard-size; `layouts.safetensors_header.SHARD_BYTES` in words
DEFAULT_SHARD_SIZE = "5GB"
DEFAULT_TASKS, TASKS = ("wikitext",), "cptq.evaluation:TASKS"
_MODEL = "a Hub id or a local directory"


def batch_size_option() -> int:
    return option(8, "Process N sequences per forward pass.", EXECUTION, "N", minimum=1)


def seed_option(
    help: str = "Set the random seed. The same seed gives the same bytes.", section: str = EXECUTION
) -> int:
    return option(0, help, section, "N", minimum=0, maximum=MOST_SEED)


def tasks_option(default: tuple[str, ...]) -> tuple[str, ...]:
    return option(
        default,
        "Run this task.",
        EVALUATION,
        "NAME",
        flags=("--task",),
        registry=TASKS,
        allowed="text:PATH",
        usual=", ".join(DEFAULT_TASKS),
    )


def data_dir_option() -> Path | None:
    help = "Read data sets from this directory, in their original layout."
    return option(None, help, ACCESS, "DIR", usual="$CPTQ_DATA")


def token_option() -> str | None:
    help, usual = "Authenticate at the Hub with this token.", "$HF_TOKEN, or the stored login"
    return option(None, help, ACCESS, "TOKEN", usual=usual, secret=True)


def trust_remote_code_option() -> bool:
    return option(False, "Run Python code that comes with the model.", ACCESS, usual="off")


def push_to_hub_option() -> str | None:
    help = "Upload the result to this Hub repository, such as your-name/model-4bit."
    return option(None, help, OUTPUT, "REPO")


def max_memory_option() -> str | None:
    help = (
        "Keep within this much memory, such as 3GB: hold one block of the model at a time, and put "
        "activations on disk. The result is the same."
    )
    return option(None, help, EXECUTION, "SIZE", usual="80% of what is free")


def max_shard_size_option() -> str:
    help = (
        "Write weight files of at most SIZE of tensors each. A larger tensor gets a file of its "
        "own."
    )
    return option(DEFAULT_SHARD_SIZE, help, OUTPUT, "SIZE")


def out_option(help: str, metavar: str = "DIR", usual: str | None = None) -> Path | None:
    flags = ("--out", "--output", "-o")
    return option(None, help, OUTPUT, metavar, flags=flags, usual=usual)


def overwrite_option() -> bool:
    return option(
        False, "Replace the output if it exists. Only what cptq wrote is removed.", OUTPUT
    )


def resume_option() -> bool:
    return option(
        False,
        "Go on with a run of this very command that was interrupted, killed or failed, from the "
        "steps that it finished.",
        OUTPUT,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Where the model comes from and how it runs."""

    model: str = field(metadata=describe_option("The model.", ARGUMENTS, "MODEL", allowed=_MODEL))
    device: str = option("auto", "Run on this device.", EXECUTION, "NAME", allowed=DEVICES)
    dtype: str = option(
        "auto",
        "Run in this data type. auto: float32 on a CPU, the checkpoint's own type on a GPU.",
        EXECUTION,
        "TYPE",
        choices=DTYPES,
    )
    revision: str | None = option(
        None, "Load this branch, tag or commit from the Hub.", ACCESS, "REV", usual="main"
    )
    token: str | None = token_option()
    trust_remote_code: bool = trust_remote_code_option()
    cache_dir: Path | None = option(
        None, "Keep downloads in this directory.", ACCESS, "DIR", usual="the Hub's own cache"
    )
    allow_pickle: bool = option(
        False,
        "Read pickle files, weights only, where a checkpoint has no safetensors.",
        ACCESS,
        usual="off",
    )

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise UsageError("the name of the model is empty", allowed=_MODEL)
        check_options(self)
        check_device(self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSettings:
    """Which text flows through the model while it is measured and compressed."""

    calibration: str = option(
        "auto",
        "Calibrate on this text. auto: wikitext if it is available, else pydoc.",
        CALIBRATION,
        "TEXT",
        allowed="auto, wikitext, pydoc, glue/TASK, or a .txt, .tsv or .jsonl file",
    )
    data_dir: Path | None = data_dir_option()
    samples: int = option(
        64,
        "Calibrate on N sequences, or on N sentences for an encoder.",
        CALIBRATION,
        "N",
        minimum=1,
    )
    seqlen: int = option(512, "Use N tokens per sequence.", CALIBRATION, "N", minimum=1)
    documents: str = option(
        "joined",
        "Cut the sequences of a language model from documents joined to one text, or from each "
        "apart, so that none crosses a border.",
        CALIBRATION,
        "HOW",
        choices=("joined", "apart"),
    )
    batch_size: int = batch_size_option()
    seed: int = seed_option()

    def __post_init__(self) -> None:
        check_options(self)
