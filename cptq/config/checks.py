"""Checks of values that need no model. Each raises `UsageError`, which says what is allowed."""

from __future__ import annotations

import re

from cptq.errors import UsageError

#: percent of the inputs that can be dropped
MOST_DROPPED = 95
ALLOWED_BITS = (2, 3, 4, 5, 6, 7, 8, 16)
DEVICES = "auto, cpu, cuda, cuda:N, xpu, mps"


def check_device(name: str) -> None:
    """Refuse a device that torch has no name for."""
    if not re.fullmatch(r"auto|cpu|mps|(?:cuda|xpu)(?::\d+)?", name):
        raise UsageError(f"--device is {name!r}", allowed=DEVICES)


def check_bits(bits: tuple[int, ...]) -> None:
    """Refuse an empty list of bit widths, and widths outside `ALLOWED_BITS`."""
    wrong = [width for width in bits if width not in ALLOWED_BITS]
    if wrong or not bits:
        what = f"holds {', '.join(map(str, wrong))}" if wrong else "is empty"
        raise UsageError(f"--bits {what}", allowed=", ".join(map(str, ALLOWED_BITS)))


def parse_sparsity(word: str) -> tuple[float, str]:
    """Return the share of zeros and their pattern: `2:4`, or `50%` of a matrix anywhere.

    Raises:
        UsageError: it is neither.
    """
    block = re.fullmatch(r"([1-7]):([2-8])", word)
    if block is not None and int(block[1]) < int(block[2]):
        return 1 - int(block[1]) / int(block[2]), word
    match = re.fullmatch(r"([1-9]\d?)\s*%", word)
    if match is None:
        raise UsageError(
            f"--sparsity holds {word!r}",
            allowed="N:M such as 2:4 or 4:8, M at most 8, and shares such as 50%, from 1% to 99%",
        )
    return int(match[1]) / 100, "unstructured"


#: methods of --activation-sparsity that take no share
WITHOUT_SHARE = ("exact",)


def parse_activation_sparsity(text: str) -> tuple[str, float | None]:
    """Return method and share of `teal:50%`; the share is None for `exact`.

    Whether there is such a method is for its registry to say.

    Raises:
        UsageError: a share is missing, too much, or not one.
    """
    method, colon, share = text.strip().partition(":")
    if method in WITHOUT_SHARE:
        if colon:
            raise UsageError(
                f"--activation-sparsity is {text!r}, and {method} takes no share",
                allowed=f"--activation-sparsity {method}",
            )
        return method, None
    match = re.fullmatch(r"([1-9]\d?)\s*%", share.strip())
    if match is None or int(match[1]) > MOST_DROPPED:
        raise UsageError(
            f"--activation-sparsity is {text!r}",
            allowed=f"exact, or a method and a share from 1% to {MOST_DROPPED}%, such as teal:50%",
        )
    return method, int(match[1]) / 100


def check_limit(limit: float | None) -> None:
    """Refuse a limit that is neither a share of the samples nor a number of them."""
    if limit is not None and not (0 < limit <= 1 or (limit > 1 and limit == int(limit))):
        raise UsageError(
            f"--limit is {limit:g}", allowed="a share in (0, 1] or a whole number of samples"
        )


def check_repository(name: str | None) -> None:
    """Refuse what is not `owner/name` (or `name`) of a repository on the Hub."""
    if name is not None and not re.fullmatch(r"(?:[\w.-]{1,96}/)?[\w.-]{1,96}", name):
        raise UsageError(
            f"--push-to-hub is {name!r}", allowed="a repository such as your-name/model-4bit"
        )


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(k|m|g|t)?(i)?b?", re.IGNORECASE)


def parse_size(text: str, flag: str) -> int:
    """Return the bytes of a size such as `3GB` (powers of 1000) or `3GiB` (of 1024).

    Raises:
        UsageError: it is no size, or 0.
    """
    match = _SIZE.fullmatch(text.strip())
    power = " kmgt".index((match[2] or " ").lower()) if match else 0
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** power) if match else 0
    if size <= 0:
        raise UsageError(f"{flag} is {text!r}", allowed="a size such as 3GB, 800MB or 1.5GiB")
    return size


def parse_max_memory(text: str | None) -> int | None:
    """Return the bytes of --max-memory, if it is given; raise as `parse_size`."""
    return None if text is None else parse_size(text, "--max-memory")


def parse_shard_size(text: str) -> int:
    """Return the bytes of --max-shard-size; raise as `parse_size`."""
    return parse_size(text, "--max-shard-size")
