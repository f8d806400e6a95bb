"""The commands: their settings, their help, and the one way in which each of them runs.

Settings are built and checked first, the work is done, and its outcome is printed. What `--help`
does not need is imported when a command runs; torch comes last, after all that can be refused
without it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import typer

from cptq.cli.environment import (
    get_rank,
    hide_foreign_bars,
    is_debugging,
    let_libraries_speak,
)
from cptq.cli.help import format_help
from cptq.cli.parameters import (
    ConfiguredPresentation,
    Presentation,
    list_parameters,
    make_signature,
)
from cptq.config import (
    AnalyzeSettings,
    AnySettings,
    BenchSettings,
    CompareSettings,
    CompressSettings,
    DoctorSettings,
    EvalSettings,
    ExportSettings,
    GenerateSettings,
    InspectSettings,
    MethodsSettings,
    Option,
    PlanSettings,
    SoupSettings,
    VerifySettings,
)
from cptq.errors import UsageError

if TYPE_CHECKING:
    from cptq.cli.failures import Failure
    from cptq.types import Emit


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command.

    Attributes:
        name: what is typed.
        settings: the class whose fields are its options.
        help: the first paragraph is also its line in `cptq --help`.
        presentation: the class of the options that are not settings.
        flags: spellings that differ from those of the fields.
    """

    name: str
    settings: type[AnySettings]
    help: str
    presentation: type[Presentation] = Presentation
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @cached_property
    def options(self) -> list[Option]:
        """All options by section."""
        return list_parameters(self.settings, self.presentation, flags=self.flags)

    @property
    def format_flag(self) -> str:
        """The option that chooses the output format."""
        return next(given.flag for given in self.options if given.name == "output_format")

    def register(self, app: typer.Typer) -> None:
        """Add the command to the app."""

        def show_help(asked: bool) -> None:
            if asked:
                typer.echo(format_help(f"cptq {self.name}", self.help, self.options))
                raise typer.Exit

        def call(**given: Any) -> None:
            run_command(self, given)

        signature = make_signature(self.options, show_help)
        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
        app.command(self.name, help=self.help, add_help_option=False)(call)


COMMANDS = (
    Command(
        name="analyze",
        settings=AnalyzeSettings,
        presentation=ConfiguredPresentation,
        help="""Measure how sensitive each layer is to compression.

        Writes the scores of each metric and a report. With --validate, also measures how well the
        scores predict the true damage.""",
    ),
    Command(
        name="plan",
        settings=PlanSettings,
        presentation=ConfiguredPresentation,
        help="""Show plans of several sizes before any work.

        MODEL is a model, whose layers are then measured, or the directory of an analysis (or of
        earlier plans), whose scores are used. Prints bytes, bits by role, predicted loss and
        estimated seconds of each target, and the front of size against predicted loss.""",
    ),
    Command(
        name="compress",
        settings=CompressSettings,
        presentation=ConfiguredPresentation,
        help="""Compress a model to a target size.

        Measures the sensitivity of the layers, chooses a bit width for each, quantizes them, writes
        the artifact with a report, and checks it by loading it in a fresh process. transformers
        loads the artifact.""",
    ),
    Command(
        name="eval",
        settings=EvalSettings,
        presentation=ConfiguredPresentation,
        help="""Evaluate a model or an artifact.

        Measures perplexity or accuracy, size, speed and memory, and with --baseline the differences
        from another model on the same samples.""",
    ),
    Command(
        name="export",
        settings=ExportSettings,
        flags={"output_format": ("--print",)},
        help="""Write an artifact in another file format.

        The quantized integers stay the same. What the format cannot hold is refused.""",
    ),
    Command(
        name="soup",
        settings=SoupSettings,
        help="""Average several dense or masked models.

        They must be of one architecture and, where they have zeros, of one mask, which the average
        keeps.""",
    ),
    Command(
        name="inspect",
        settings=InspectSettings,
        help="""Show what a checkpoint, an artifact or a GGUF file holds.

        Reads only headers, so it is fast for files of any size. Of a checkpoint it says what
        compress will do: what is compressed, what stays dense and why, which layers are one
        decision, and which runtimes take the result.""",
    ),
    Command(
        name="verify",
        settings=VerifySettings,
        help="""Check that an artifact is intact.

        Compares the digests of files and tensors with cptq.json, then loads the artifact in a fresh
        process and compares its outputs with the recorded sample.""",
    ),
    Command(
        name="compare",
        settings=CompareSettings,
        presentation=ConfiguredPresentation,
        help="""Compare the size, quality, speed and memory of several models.

        Each model is compared with the first one on the same samples.""",
    ),
    Command(
        name="bench",
        settings=BenchSettings,
        presentation=ConfiguredPresentation,
        help="""Measure the speed, load time and memory of several models.

        Each model runs in a process of its own; they take turns, so that other work on the machine
        meets all of them alike. Figures are medians, compared with the first model's.""",
    ),
    Command(
        name="generate",
        settings=GenerateSettings,
        presentation=ConfiguredPresentation,
        help="""Continue a text with a language model or an artifact.

        The text goes to stdout piece by piece, without the prompt; numbers of tokens and their
        speed go to stderr.""",
    ),
    Command(
        name="doctor",
        settings=DoctorSettings,
        help="""Show what is installed and what is missing.

        Shows versions, devices, memory, disk, kernels and data, and names the command that brings
        what is missing. Exits with 1 if something is missing that cptq does not work without.""",
    ),
    Command(
        name="methods",
        settings=MethodsSettings,
        help="""List the methods that can be chosen.

        Metrics, allocators, compressors, formats, runtimes and tasks, each with its paper, its
        cost, and what it is good for by our own measurements.""",
    ),
)


def run_command(command: Command, given: Mapping[str, Any]) -> None:
    """Run a command with the parameters that were given (None or empty: not given).

    Raises:
        typer.Exit: with the exit code of a failure, which has been printed.
    """
    from cptq.api import execute
    from cptq.cli.console import Console
    from cptq.cli.continuation import spell_continuation
    from cptq.cli.failures import describe_failure, report_failures
    from cptq.cli.output import print_outcome
    from cptq.cli.signals import catch_signals
    from cptq.config import save_recipe, settings_from
    from cptq.preflight import check_settings

    line = {name: value for name, value in given.items() if value not in (None, [], ())}
    line.pop("help", None)
    rank, count = get_rank(os.environ)
    verbose = line.pop("verbose", False)
    console = Console(line.pop("output_format", "human"), rank, verbose=verbose)
    if verbose:
        let_libraries_speak(os.environ)
    settings: AnySettings | None = None

    def continuation() -> str | None:
        return None if settings is None else spell_continuation(settings, sys.argv)

    with catch_signals() as signals, report_failures(console, signals, continuation):
        file = line.pop("config", None)
        save = line.pop("save_config", None)
        settings = check_settings(settings_from(command.settings, line, file=file))
        if save is not None and rank == 0:
            save_recipe(settings, save)
        if not is_debugging(os.environ):
            hide_foreign_bars()
        if count == 1:
            outcome = execute(settings, signals.pass_on(console.emit))
        else:
            outcome = _execute_together(
                settings, signals.pass_on(console.emit), lambda e: describe_failure(e, signals)
            )
        console.close()
        if rank == 0:
            print_outcome(console, command.name, settings, outcome)
            if isinstance(settings, DoctorSettings) and not outcome.works:
                raise typer.Exit(1)


def _execute_together(
    settings: AnySettings, emit: Emit, describe: Callable[[BaseException], Failure]
) -> Any:
    """Carry out a command in one of the processes that a launcher has started for it.

    Raises:
        UsageError: it is not one that several processes can share.
    """
    from cptq.api import execute

    if not isinstance(settings, CompressSettings):
        raise UsageError(
            "a launcher has started this command in several processes, which would all do the same",
            allowed="cptq compress",
            hint="start it without the launcher",
        )
    from cptq.checkpoint.ranks import join

    with join(settings.model.device, lambda error: describe(error).sentence) as ranks:
        return execute(settings, emit, ranks)
