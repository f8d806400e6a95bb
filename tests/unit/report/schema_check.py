"""A check of data against the part of JSON Schema that docs/report.schema.json uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,),
    "integer": (int,), "number": (int, float), "null": (type(None),),
}  # fmt: skip
KNOWN = {
    *("$schema", "$defs", "$ref", "title", "description", "type", "properties", "required"),
    *("additionalProperties", "items", "enum", "const", "anyOf"),
}


def list_faults(data: Any, schema: Mapping[str, Any]) -> list[str]:
    """Return what in the data is not as the schema says, each with its place."""
    return list(_check(data, schema, schema, "$"))


def _check(data: Any, rule: Mapping[str, Any], root: Mapping[str, Any], at: str) -> Iterator[str]:
    unknown = set(rule) - KNOWN
    assert not unknown, f"this check does not know {unknown}"
    if "$ref" in rule:
        rule = root["$defs"][rule["$ref"].rpartition("/")[2]]
    if "anyOf" in rule and all(list(_check(data, one, root, at)) for one in rule["anyOf"]):
        yield f"{at}: {data!r} is nothing that is allowed"
    if "const" in rule and data != rule["const"]:
        yield f"{at}: {data!r} is not {rule['const']!r}"
    if "enum" in rule and data not in rule["enum"]:
        yield f"{at}: {data!r} is not one of {rule['enum']}"
    if "type" in rule and not _is_of(data, rule["type"]):
        yield f"{at}: {data!r} is no {rule['type']}"
        return
    if isinstance(data, dict):
        yield from _check_object(data, rule, root, at)
    if isinstance(data, list):
        for index, item in enumerate(data):
            yield from _check(item, rule.get("items", {}), root, f"{at}[{index}]")


def _check_object(
    data: Mapping[str, Any], rule: Mapping[str, Any], root: Mapping[str, Any], at: str
) -> Iterator[str]:
    known, rest = rule.get("properties", {}), rule.get("additionalProperties", True)
    yield from (f"{at}: {name} is missing" for name in rule.get("required", ()) if name not in data)
    for name, value in data.items():
        if name in known:
            yield from _check(value, known[name], root, f"{at}.{name}")
        elif rest is False:
            yield f"{at}: {name} is not known"
        elif isinstance(rest, Mapping):
            yield from _check(value, rest, root, f"{at}.{name}")


def _is_of(data: Any, kinds: str | list[str]) -> bool:
    names = [kinds] if isinstance(kinds, str) else kinds
    if isinstance(data, bool):
        return "boolean" in names
    return any(isinstance(data, TYPES[name]) for name in names)
