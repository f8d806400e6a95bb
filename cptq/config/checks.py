"""What needs no model to be seen wrong: numbers and names out of their range.

Each raises `UsageError`, which says what is allowed.
"""

from __future__ import annotations

import re

from cptq.errors import UsageError

#: fields whose option, and whose key in a file, is spelled in the singular
SINGULAR = {
    "metrics": "metric",
    "tasks": "task",
    "targets": "target",
    "allocators": "allocator",
    "pins": "pin",
}
ALLOWED_BITS = (2, 3, 4, 5, 6, 7, 8, 16)


def option(name: str) -> str:
    """The spelling of a field on the command line: `--batch-size` for `batch_size`."""
    return "--" + SINGULAR.get(name, name).replace("_", "-")


def at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise UsageError(
                f"{option(name)} is {value}", allowed=f"a whole number of at least {least}"
            )


def check_bits(bits: tuple[int, ...]) -> None:
    wrong = [width for width in bits if width not in ALLOWED_BITS]
    if wrong or not bits:
        what = f"holds {', '.join(map(str, wrong))}" if wrong else "is empty"
        raise UsageError(f"--bits {what}", allowed=", ".join(map(str, ALLOWED_BITS)))


def parse_sparsity(word: str) -> tuple[float, str]:
    """The share of weights that are 0, and their pattern: `2:4`, or `50%` of a matrix anywhere.

    Raises:
        UsageError: it is neither.
    """
    if word == "2:4":
        return 0.5, word
    match = re.fullmatch(r"([1-9]\d?)\s*%", word)
    if match is None:
        raise UsageError(
            f"--sparsity holds {word!r}", allowed="2:4, and shares such as 50%, from 1% to 99%"
        )
    return int(match[1]) / 100, "unstructured"


def check_limit(limit: float | None) -> None:
    if limit is not None and not (0 < limit <= 1 or (limit > 1 and limit == int(limit))):
        raise UsageError(
            f"--limit is {limit:g}", allowed="a share in (0, 1] or a whole number of samples"
        )


def check_repository(name: str | None) -> None:
    """Refuse what is no `owner/name` (or `name`) of a repository on the Hub."""
    if name is not None and not re.fullmatch(r"(?:[\w.-]{1,96}/)?[\w.-]{1,96}", name):
        raise UsageError(
            f"--push-to-hub is {name!r}", allowed="a repository such as your-name/model-4bit"
        )
