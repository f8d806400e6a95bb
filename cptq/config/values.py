"""Between settings and the flat names that people type: options, YAML keys, a line to repeat a run.

Text may stand for a path and for a comma-separated list; nothing else is turned into another type.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from cptq.config.checks import option
from cptq.config.runtimes import DEFAULT_RUNTIME, find_runtime
from cptq.config.settings import COMMANDS, AnalyzeSettings, CompressSettings, Settings
from cptq.errors import UsageError

S = TypeVar("S")


def flat_fields(kind: type) -> dict[str, Any]:
    """Name to type of every field of a settings class, nested settings unfolded."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        nested = isinstance(hint, type) and is_dataclass(hint)
        found.update(flat_fields(hint) if nested else {name: hint})
    return found


def describe(settings: Settings) -> dict[str, Any]:
    """All settings as plain data for a report, without the access token."""
    found: dict[str, Any] = {}
    for item in fields(settings):
        value = getattr(settings, item.name)
        if is_dataclass(value):
            found.update(describe(value))  # type: ignore[arg-type]
        elif item.name != "token":
            found[item.name] = list(value) if isinstance(value, tuple) else value
    return {name: str(v) if isinstance(v, Path) else v for name, v in found.items()}


def command_line(settings: Settings) -> str:
    """The shortest `cptq ...` line that gives these settings (never the access token)."""
    given = describe(settings)
    others = given.pop("others", [])
    least: dict[str, Any] = {n: given[n] for n in ("model", "runtime") if n in given}
    usual = describe(build(type(settings), least | {"others": tuple(others)}))
    usual |= {"runtime": DEFAULT_RUNTIME}
    words = ["cptq", COMMANDS[type(settings)], given["model"], *others]
    for name, value in given.items():
        if name != "model" and value != usual[name] and value is not None:
            words += _words(name, value)
    return shlex.join(words)


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [option(name) if value else option(name).replace("--", "--no-", 1)]
    if name in ("bits", "lm_eval", "sparsity"):
        return [option(name), ",".join(map(str, value))]
    values = value if isinstance(value, list) else [value]
    whole = [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]
    return [word for item in whole for word in (option(name), f"{item}")]


def build(kind: type[S], values: Mapping[str, Any]) -> S:
    """Settings from flat values by name; what is not given keeps its default.

    Raises:
        UsageError: no model, or a value out of its range.
    """
    if not values.get("model"):
        raise UsageError("no model is given", allowed="a Hub id or a local directory")
    if kind in (AnalyzeSettings, CompressSettings):
        values = _of_runtime(values)
    own: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            own[name] = build(hint, values)  # type: ignore[arg-type]
        elif name in values:
            own[name] = values[name]
    return kind(**own)


def _of_runtime(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with a runtime's own bits and group size where none are given."""
    runtime = find_runtime(values.get("runtime", DEFAULT_RUNTIME))
    return {"bits": runtime.default_bits, "group_size": runtime.group_size, **values}


def convert(where: str, hint: Any, value: Any) -> Any:
    """`value` as the field type `hint` asks.

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
        items = [_number(item) for item in items]
        converted = [_convert_one(where, int, item) for item in items]
        return tuple(sorted(dict.fromkeys(converted)))
    return tuple(dict.fromkeys(_convert_one(where, kind, item) for item in items))


def _number(item: Any) -> Any:
    return int(item) if isinstance(item, str) and item.strip().isdecimal() else item


_WORDS = {
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
    raise UsageError(f"{where} is {value!r}", allowed=_WORDS[kind])
