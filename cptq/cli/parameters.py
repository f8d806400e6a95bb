"""Typer parameters made from the fields of settings classes, so that no option is written twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

from cptq.config.options import GENERAL, OUTPUT, SECTIONS, Option, list_options, option

OutputFormat = Literal["human", "json", "quiet"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Presentation:
    """The options of every command that are not settings of a run."""

    output_format: OutputFormat = option(
        "human",
        "Print tables (human), one JSON document (json), or only the path or number (quiet).",
        OUTPUT,
        "human|json|quiet",
        flags=("--format",),
    )
    verbose: bool = option(
        False,
        "Show every step with its time, every notice, and the messages of libraries.",
        GENERAL,
        flags=("--verbose", "-v"),
    )
    help: bool = option(False, "Show this message and exit.", GENERAL, flags=("--help", "-h"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfiguredPresentation(Presentation):
    """With the YAML file that commands take which have many settings."""

    config: Path | None = option(
        None,
        "Read options from this YAML file; the keys are option names, and model. The command line "
        "takes precedence.",
        GENERAL,
        "FILE",
    )
    save_config: Path | None = option(
        None,
        "Write all options of this run to this YAML file, for --config.",
        GENERAL,
        "FILE",
    )


def list_parameters(*kinds: type, flags: Mapping[str, tuple[str, ...]]) -> list[Option]:
    """Return the options of some classes by section, --help last; `flags` overrides spellings."""
    found = {name: given for kind in kinds for name, given in list_options(kind).items()}
    renamed = [replace(o, flags=flags.get(name, o.flags)) for name, o in found.items()]
    return sorted(renamed, key=lambda o: (SECTIONS.index(o.section), _rank(o)))


def _rank(given: Option) -> int:
    """Return the place in a section: --target before what else decides a plan, --help last."""
    return -1 if given.flag == "--target" else int(given.name == "help")


def make_signature(options: list[Option], show_help: Callable[[bool], None]) -> Signature:
    """Return a signature that Typer reads the options from; None means: not given."""
    return Signature([_make_parameter(given, show_help) for given in options])


def _make_parameter(given: Option, show_help: Callable[[bool], None]) -> Parameter:
    kind: Any = str if given.commas else given.value_type
    info: Any
    if given.positional:
        info = typer.Argument(metavar=given.metavar)
    elif given.name == "help":
        info = typer.Option(*given.flags, is_eager=True, callback=show_help)
    else:
        parser = _make_parser(given) if kind in (int, float, OutputFormat) else None
        info = typer.Option(
            *_spell_flags(given),
            metavar=given.metavar or None,
            parser=parser,
            autocompletion=_make_completion(given),
        )
    several = given.plural and not given.commas
    hint = (list[kind] if several else kind) | None
    return Parameter(
        given.name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[hint, info]
    )


def _make_parser(given: Option) -> Callable[[str], Any]:
    """Return a parser whose errors name the value and what is allowed."""
    words = get_args(given.value_type)
    allowed = ", ".join(words) or ("a whole number" if given.value_type is int else "a number")

    def parse(text: str) -> Any:
        if text in words:
            return text
        try:
            return given.value_type(text)
        except (TypeError, ValueError):
            raise typer.BadParameter(f"{text!r}; allowed: {allowed}") from None

    return parse


def _make_completion(given: Option) -> Callable[[str], list[str]] | None:
    """Return what a shell completes the value from: the accepted names, where there are any."""
    if not (given.registry or given.choices):
        return None

    def complete(incomplete: str) -> list[str]:
        names = [*given.choices, *(given.load_registry() if given.registry else ())]
        return [name for name in names if name.startswith(incomplete)]

    return complete


def _spell_flags(given: Option) -> tuple[str, ...]:
    """Return the flags, with `--no-...` for what is on by default."""
    if given.default is True:
        return tuple(f"{flag}/{flag.replace('--', '--no-', 1)}" for flag in given.flags)
    return given.flags
