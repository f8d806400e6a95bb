"""Settings from named values and back: options of a line, keys of a file, a line to repeat a run.

The command line wins over the file, the file over the defaults. Keys of a file are the options'
names (`group-size` or `group_size`); an unknown key is an error that names the nearest one, and so
is a key given twice. A relative path is relative to the current directory, as on the command line.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from cptq.config.analysis import read_analysis
from cptq.config.candidates import CandidateSettings
from cptq.config.options import Option, list_fixed, list_options
from cptq.config.runtimes import DEFAULT_RUNTIME, find_runtime
from cptq.config.settings import COMMANDS, AnySettings, PlanSettings
from cptq.errors import UsageError
from cptq.registry import find_closest

S = TypeVar("S")


def settings_from(kind: type[S], line: Mapping[str, Any], file: Path | None = None) -> S:
    """Return settings from the options given on a line (None: not given) and a YAML file.

    Raises:
        UsageError: an unknown or doubled key, a value of a wrong type or out of its range, or
            options that another given option already determines.
    """
    options = list_options(kind)
    given = {
        name: _convert_given(options[name], options[name].title, value)
        for name, value in line.items()
        if value is not None
    }
    return build(kind, _merge(kind, given, read_file(kind, file) if file else {}))


def _merge(kind: type, line: dict[str, Any], file: dict[str, Any]) -> dict[str, Any]:
    """Join the two sources; an option on the line also removes from the file what conflicts."""
    for source in (line, file):
        _check_conflicts(kind, source)
    for fixing, others in list_fixed(kind).items():
        fixed = {option.name for option in others}
        if fixing in line:
            file = {name: value for name, value in file.items() if name not in fixed}
        elif fixed & set(line):
            file = {name: value for name, value in file.items() if name != fixing}
    merged = {**file, **line}
    return {**merged, "target": None} if "plan" in merged else merged


def _check_conflicts(kind: type, given: Mapping[str, Any]) -> None:
    for fixing, others in list_fixed(kind).items():
        flags = [option.flag for option in others if option.name in given]
        if fixing in given and flags:
            flag, refused = list_options(kind)[fixing].flag, " and ".join(flags)
            raise UsageError(
                f"{refused} cannot be combined with {flag}, which already determines "
                f"{'it' if len(flags) == 1 else 'them'}",
                hint=f"leave out {refused}, or {flag}",
            )


def read_file(kind: type, path: Path) -> dict[str, Any]:
    """Return the values in a YAML file by field name, each of its field's type.

    Raises:
        UsageError: the file cannot be read, is not a mapping, or has an unknown key or a value of
            a wrong type; the message names the file, the key and the nearest known one.
    """
    from cptq.config.yaml_mapping import load_mapping  # imports yaml, which only files need

    options = list_options(kind)
    given = name_fields(options, load_mapping(path), f"{path}: unknown key")
    return {
        name: _convert_given(options[name], f"{path}: {key}", value)
        for name, (key, value) in given.items()
    }


def name_fields(
    options: Mapping[str, Option], given: Mapping[Any, Any], unknown: str
) -> dict[str, tuple[str, Any]]:
    """Return {field name: (key as given, value)}; a key is a field's name or its option's.

    Args:
        options: by field name.
        given: by key, as in a YAML file or among keyword arguments.
        unknown: how the message about an unknown key begins.

    Raises:
        UsageError: an unknown key, or two keys of one option.
    """
    names = {option.key: name for name, option in options.items()} | {
        name: name for name in options
    }
    found: dict[str, tuple[str, Any]] = {}
    for key, value in given.items():
        name = names.get(str(key).replace("-", "_"))
        if name is None:
            near = find_closest(str(key), list(names))
            raise UsageError(
                f"{unknown} {str(key)!r}",
                allowed=", ".join(option.key for option in options.values()),
                hint=f"did you mean {near!r}?" if near else None,
            )
        if name in found:
            both = f"{found[name][0]!r} and {str(key)!r}"
            raise UsageError(f"{both} are the same option", hint="give one of them")
        found[name] = str(key), value
    return found


def build(kind: type[S], values: Mapping[str, Any]) -> S:
    """Return settings from values by field name; fields without a value keep their default.

    Raises:
        UsageError: a required value is missing, or a value is out of its range.
    """
    for name, option in list_options(kind).items():
        if option.required and not values.get(name):
            raise UsageError(f"no {option.title} is given", allowed=option.list_allowed())
    if issubclass(kind, PlanSettings):
        values = _add_analysis(values)
    if issubclass(kind, CandidateSettings):
        values = _add_runtime_defaults(values)
    own: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            own[name] = build(hint, values)  # type: ignore[arg-type]
        elif name in values:
            own[name] = values[name]
    return kind(**own)


def _add_runtime_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with the runtime's own bits and group size where none are given."""
    runtime = find_runtime(values.get("runtime", DEFAULT_RUNTIME))
    return {"bits": runtime.default_bits, "group_size": runtime.group_size, **values}


def _add_analysis(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with what an analysis was measured with, where the model names one."""
    known = read_analysis(Path(values["model"]).expanduser(), values.get("metric"))
    if known is None:
        return dict(values)
    if "runtime" in values:  # which then decides about these
        known = {n: value for n, value in known.items() if n not in ("bits", "group_size")}
    options = list_options(PlanSettings)
    measured = {
        name: convert(f"{values['model']}: {name}", options[name].hint, value)
        for name, value in known.items()
    }
    own = {n: value for n, value in values.items() if n not in ("model", "metric")}
    return {**measured, **own}


def flat_fields(kind: type) -> dict[str, Any]:
    """Return the type of every field of a settings class by name, nested settings included."""
    return {name: option.hint for name, option in list_options(kind).items()}


def describe(settings: AnySettings) -> dict[str, Any]:
    """Return all settings as plain data for a report, without the access token."""
    found: dict[str, Any] = {}
    for item in fields(settings):
        value = getattr(settings, item.name)
        if is_dataclass(value):
            found.update(describe(value))  # type: ignore[arg-type]
        elif item.repr:  # secrets are hidden from `repr`, and so from reports
            found[item.name] = list(value) if isinstance(value, tuple) else value
    return {name: str(v) if isinstance(v, Path) else v for name, v in found.items()}


def command_line(settings: AnySettings) -> str:
    """Return the shortest `cptq ...` line that gives these settings, without the access token."""
    kind = type(settings)
    options, given = list_options(kind), describe(settings)
    needed = {n: given[n] for n in given if options[n].positional or options[n].required}
    usual = describe(build(kind, needed | {n: given[n] for n in ("runtime",) if n in given}))
    usual |= {"runtime": DEFAULT_RUNTIME}
    words = ["cptq", COMMANDS[kind]]
    for name, option in options.items():
        if option.positional:
            value = given[name]
            words += map(str, value if isinstance(value, list) else [value])
    for name, value in given.items():
        shown = options[name].required or value != usual[name]
        if not options[name].positional and shown and value is not None:
            words += _spell(options[name], value)
    return shlex.join(words)


def spell_options(settings: AnySettings) -> dict[str, str]:
    """Return {flag: the words that give an option its value}; empty where it has none.

    Without the access token. An argument has a flag here too: `--model`.
    """
    options, given = list_options(type(settings)), describe(settings)
    return {
        options[name].flag: "" if value is None else shlex.join(_spell(options[name], value))
        for name, value in given.items()
    }


def _spell(option: Option, value: Any) -> list[str]:
    """Return an option with a value as words of a command line."""
    if isinstance(value, bool):
        return [option.flag if value else option.flag.replace("--", "--no-", 1)]
    if option.commas:
        return [option.flag, ",".join(map(str, value))]
    values = value if isinstance(value, list) else [value]
    whole = [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]
    return [word for item in whole for word in (option.flag, f"{item}")]


def _convert_given(option: Option, where: str, value: Any) -> Any:
    kept = option.verbatim and isinstance(value, str)
    return value if kept else convert(where, option.hint, value)


def convert(where: str, hint: Any, value: Any) -> Any:
    """Return `value` as the field type `hint` requires.

    Text may stand for a path and for a comma-separated list; nothing else is turned into
    another type.

    Raises:
        UsageError: it is of another type; the message starts with `where`.
    """
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] or [hint]
    if value is None and NoneType in get_args(hint):
        return None
    if get_origin(hint) is tuple:
        return _convert_list(where, kinds[0], value)
    return _convert_one(where, kinds[0], value)


def _convert_list(where: str, kind: type, value: Any) -> tuple[Any, ...]:
    items = value if isinstance(value, list | tuple) else str(value).split(",")
    if kind is int:
        items = [_read_number(item) for item in items]
        converted = [_convert_one(where, int, item) for item in items]
        return tuple(sorted(dict.fromkeys(converted)))
    return tuple(dict.fromkeys(_convert_one(where, kind, item) for item in items))


def _read_number(item: Any) -> Any:
    return int(item) if isinstance(item, str) and item.strip().isdecimal() else item


_TYPE_WORDS = {
    str: "text (in quotes where it looks like a number)",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path",
}


def _convert_one(where: str, kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str | Path) and str(value):
        return Path(value).expanduser()
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind is not float and type(value) is kind:
        return value.strip() if isinstance(value, str) else value
    raise UsageError(f"{where} is {value!r}", allowed=_TYPE_WORDS[kind])
