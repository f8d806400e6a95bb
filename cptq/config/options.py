"""Options: what a settings field is called, means and accepts, written once in the field itself.

    samples: int = option(64, "Calibrate on N sequences.", CALIBRATION, "N", minimum=1)

The command line, `--help`, YAML files and error messages all read `list_options(settings_class)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from importlib import import_module
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from cptq.errors import UsageError
from cptq.registry import Registry, find_closest

ARGUMENTS = "Arguments"
PLAN, CANDIDATES, CONSTRAINTS = "Plan", "Candidates", "Constraints"
SENSITIVITY, VALIDATION, EVALUATION = "Sensitivity", "Validation", "Evaluation"
CALIBRATION, EXECUTION, ACCESS = "Calibration", "Execution", "Access"
OUTPUT, GENERAL, GENERATION = "Output", "General", "Generation"
#: the sections of `--help`, in their order
SECTIONS = (
    *(ARGUMENTS, PLAN, SENSITIVITY, CANDIDATES, CONSTRAINTS, VALIDATION, EVALUATION),
    *(GENERATION, CALIBRATION, EXECUTION, ACCESS, OUTPUT, GENERAL),
)
_KEY = "option"
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option of a command.

    `option` writes the first group of attributes into a field's metadata; `list_options` adds the
    second group, which it reads from the field.

    Attributes:
        help: what the option does: imperative sentences, without default and allowed values.
        section: the heading in `--help`; an option in `ARGUMENTS` is given without a flag.
        flags: all spellings; the first gives the key in YAML files. Default: made from the name.
        metavar: what stands for the value in `--help`; empty for a flag without a value.
        commas: a list written as one value separated by commas, instead of a repeated flag.
        minimum: the least number accepted.
        choices: the only words accepted.
        registry: "module:attribute" of the `Registry` that holds the accepted names; a text, since
            registries belong to packages above this one.
        allowed: accepted values in words; with `registry`, those beside its names.
        usual: the default in words, where the value itself does not say it.
        verbatim: a text whose spaces at both ends matter, so that none are removed.
        fixed_by: options that already determine this one; giving both is an error.
        name: the field's name.
        hint: the field's type.
        default: the field's default.
        required: whether the field has no default, so that a value must be given.
    """

    help: str
    section: str
    flags: tuple[str, ...] = ()
    metavar: str = ""
    commas: bool = False
    minimum: int | None = None
    maximum: int | None = None
    choices: tuple[str, ...] = ()
    registry: str | None = None
    allowed: str | None = None
    usual: str | None = None
    verbatim: bool = False
    fixed_by: tuple[str, ...] = ()

    name: str = ""
    hint: Any = None
    default: Any = None
    required: bool = False

    @property
    def flag(self) -> str:
        """The main spelling on the command line: `--batch-size` for `batch_size`."""
        return self.flags[0]

    @property
    def key(self) -> str:
        """The main spelling in a YAML file: `metric` for `--metric`."""
        return self.flag.lstrip("-").replace("-", "_")

    @property
    def title(self) -> str:
        """The option in a message: `--metric`, or `model` for an argument."""
        return self.metavar.lower().rstrip(".") if self.positional else self.flag

    @property
    def positional(self) -> bool:
        """Whether it is given without a flag."""
        return self.section == ARGUMENTS

    @property
    def value_type(self) -> Any:
        """The type of one value: `int` for `tuple[int, ...]` and for `int | None`."""
        given = [kind for kind in get_args(self.hint) if kind not in (NoneType, Ellipsis)]
        return given[0] if given and isinstance(given[0], type) else self.hint

    @property
    def plural(self) -> bool:
        """Whether the field holds several values."""
        return get_origin(self.hint) is tuple

    @property
    def repeatable(self) -> bool:
        """Whether the flag may be given several times."""
        return self.plural and not self.commas and not self.positional

    def list_allowed(self) -> str | None:
        """Return the accepted values in words, or None where the help says it all."""
        names = [*self.choices, *(self.load_registry() if self.registry else ())]
        return ", ".join([*names, *([self.allowed] if self.allowed else [])]) or None

    def load_registry(self) -> Registry[Any]:
        """Return the registry of the accepted names."""
        module, _, attribute = (self.registry or "").partition(":")
        found: Registry[Any] = getattr(import_module(module), attribute)
        return found

    def describe_default(self) -> str | None:
        """Return the default in words, or None where there is nothing to say."""
        if self.usual is not None:
            return self.usual
        if isinstance(self.default, bool):
            return "on" if self.default else None
        if self.default in (None, ()):
            return None
        if isinstance(self.default, tuple):
            return ("," if self.commas else ", ").join(map(str, self.default))
        return str(self.default)

    def describe(self) -> str:
        """Return the help with the accepted values, whether it repeats, and the default."""
        allowed, default = self.list_allowed(), self.describe_default()
        parts = [
            self.help,
            f"Allowed: {allowed}." if allowed else "",
            "Repeatable." if self.repeatable else "",
            f"Default: {default}." if default else "",
        ]
        return " ".join(part for part in parts if part)

    def check(self, value: Any) -> None:
        """Refuse a value below the minimum, above the maximum or outside the choices.

        Raises:
            UsageError: names the option, the value and what is allowed.
        """
        if self.minimum is not None and value is not None and value < self.minimum:
            allowed = f"a whole number of at least {self.minimum}"
            raise UsageError(f"{self.flag} is {value}", allowed=allowed)
        if self.maximum is not None and value is not None and value > self.maximum:
            allowed = f"a whole number from {self.minimum or 0} to {self.maximum}"
            raise UsageError(f"{self.flag} is {value}", allowed=allowed)
        if self.choices and value not in self.choices:
            near = find_closest(str(value), list(self.choices))
            raise UsageError(
                f"{self.flag} is {value!r}",
                allowed=", ".join(self.choices),
                hint=f"did you mean {near!r}?" if near else None,
            )


def option(
    default: T, help: str, section: str, metavar: str = "", *, secret: bool = False, **more: Any
) -> T:
    """Return a dataclass field that is an option; `more` are further attributes of `Option`.

    `secret`: its value is shown in no report and no message.
    """
    # typed as its default, as `dataclasses.field` is, so that type checkers accept it for the field
    return field(
        default=default,
        repr=not secret,
        metadata=describe_option(help, section, metavar, **more),
    )


def describe_option(help: str, section: str, metavar: str, **more: Any) -> Mapping[str, Option]:
    """Return the metadata of a field whose value must be given: `field(metadata=...)`."""
    return {_KEY: Option(help=help, section=section, metavar=metavar, **more)}


def list_options(kind: type) -> dict[str, Option]:
    """Return the options of a settings class by field name, those of nested settings included."""
    hints = get_type_hints(kind)
    found: dict[str, Option] = {}
    for item in fields(kind):
        hint = hints[item.name]
        if isinstance(hint, type) and is_dataclass(hint):
            found |= list_options(hint)
        else:
            found[item.name] = replace(_read_option(item), hint=hint)
    return found


def find_flag(kind: type, name: str) -> str:
    """Return the flag of a field of a settings class: `--metric` for `metrics`."""
    return next(_read_option(item) for item in fields(kind) if item.name == name).flag


def check_options(settings: Any) -> None:
    """Check every field of a settings value against its own minimum and choices.

    Raises:
        UsageError: names the option, the value and what is allowed.
    """
    for item in fields(settings):
        if _KEY in item.metadata:
            _read_option(item).check(getattr(settings, item.name))


def _read_option(item: Field[Any]) -> Option:
    written: Option = item.metadata[_KEY]
    flags = written.flags or ("--" + item.name.replace("_", "-"),)
    required = item.default is MISSING
    default = None if required else item.default
    return replace(written, flags=flags, name=item.name, default=default, required=required)


def list_fixed(kind: type) -> dict[str, list[Option]]:
    """Return, by the name of an option that determines others, those others."""
    found: dict[str, list[Option]] = {}
    for other in list_options(kind).values():
        for fixing in other.fixed_by:
            found.setdefault(fixing, []).append(other)
    return found
