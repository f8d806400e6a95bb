"""Targets: the text after --target, and the budget in bytes that it stands for.

| typed      | budget                                                                           |
|------------|----------------------------------------------------------------------------------|
| `4bit`     | the file of a uniform 4-bit model at the run's group size; `3.5bit` is half way    |
|            | between 3 and 4, so that mixed and uniform plans are compared at equal bytes       |
| `3.5bpw`   | 3.5 bits per compressible weight, scales included; the rest of the file is free    |
| `25%`      | that share of the checkpoint's bytes at 16 bits per weight, whole file             |
| `120MB`    | whole file; KB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024                   |

The way from text to plan is: `parse_target` reads a `Target`, `resolve_budget` turns it into a
`Budget`, `build_ledger` (in `ledger`) counts every option against it, and `check_target` refuses a
target that no plan reaches, together with the nearest one that works. `resolve_target` does all
four.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from cptq.allocation.cost import CostModel
from cptq.allocation.ledger import Candidates, Ledger, build_ledger
from cptq.errors import BudgetError
from cptq.types import Budget, Candidate

Kind = Literal["bit", "bpw", "%", "bytes"]
ALLOWED = "4bit (2bit to 16bit), 3.5bpw, 25%, 120MB (KB, MB, GB, KiB, MiB, GiB)"
#: bits of the uniform models between which `bit` targets interpolate
LEVELS = (2, 3, 4, 5, 6, 7, 8, 16)
_EXAMPLE = "type for example --target 4bit"
_MULTIPLES: Mapping[str, int] = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
_KINDS: Mapping[str, Kind] = {"bit": "bit", "bits": "bit", "bpw": "bpw", "%": "%"}
_PATTERN = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*([a-z%]+)\s*", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A parsed target: `value` in units of `suffix`, and the `text` as typed.

    `value` is a fraction, since a float cannot hold 0.1 exactly.
    """

    value: Fraction
    kind: Kind
    suffix: str
    text: str

    @property
    def multiple(self) -> int:
        """Bytes of one unit of a size target; 1 otherwise."""
        return _MULTIPLES.get(self.suffix.lower(), 1)

    def round_up(self, value: Fraction) -> Fraction:
        """Round a value in this target's unit up, to two decimals or three digits."""
        scale = 10 ** _count_decimals(value)
        return Fraction(math.ceil(value * scale), scale)

    def spell(self, value: Fraction) -> str:
        """Return the target of a value, rounded up, as it would be typed."""
        decimals = _count_decimals(value)
        whole = math.ceil(value * 10**decimals)
        text = f"{whole // 10**decimals}.{whole % 10**decimals:0{decimals}d}"
        return text.rstrip("0").rstrip(".") + self.suffix


def _count_decimals(value: Fraction) -> int:
    decimals = 2
    while 0 < value * 10**decimals < 100:
        decimals += 1
    return decimals


def parse_target(text: str) -> Target:
    """Read a target such as `4bit`.

    Raises:
        BudgetError: the text has none of the known forms, or its number is not above 0.
    """
    match = _PATTERN.fullmatch(text)
    suffix = match[2] if match else ""
    kind = _KINDS.get(suffix.lower()) or ("bytes" if suffix.lower() in _MULTIPLES else None)
    if match is None or kind is None:
        is_number = re.fullmatch(r"\s*\d+\.?\d*\s*", text)
        hint = f"did you mean {text.strip()}bit?" if is_number else _EXAMPLE
        raise BudgetError(f"invalid target {text!r}", allowed=ALLOWED, hint=hint)
    value = Fraction(match[1])
    if value <= 0:
        raise BudgetError(
            f"the target {text.strip()} is not above 0", allowed=ALLOWED, hint=_EXAMPLE
        )
    return Target(value=value, kind=kind, suffix=suffix, text=text.strip())


def resolve_target(text: str, cost: CostModel, group_size: int, candidates: Candidates) -> Ledger:
    """Turn a target as typed into the ledger that a plan is made with.

    Args:
        text: what the user typed.
        cost: the bytes of the model.
        group_size: of the uniform models that `bit` targets mean.
        candidates: the candidates of all units, or {unit: its candidates}.

    Raises:
        BudgetError: the target cannot be read, or no plan reaches it.
    """
    target = parse_target(text)
    budget = resolve_budget(target, cost, group_size)
    ledger = build_ledger(budget, cost, candidates)
    check_target(target, ledger, group_size)
    return ledger


def resolve_budget(target: Target, cost: CostModel, group_size: int) -> Budget:
    """Turn a target into bytes, whether or not a plan reaches them.

    Raises:
        BudgetError: a target in bpw for a model without compressible weights.
    """
    if target.kind != "bpw":
        limit = math.floor(_to_file_bytes(target, cost, group_size))
        return Budget(limit_bytes=limit, scope="file", asked=target.text)
    if not cost.compressible:
        raise BudgetError(
            f"the target {target.text} limits the compressible weights, and the model has none",
            allowed="a size of the whole file such as 100%",
        )
    limit = math.floor(target.value * cost.compressible / 8)
    return Budget(limit_bytes=limit, scope="weights", asked=target.text)


def check_target(target: Target, ledger: Ledger, group_size: int) -> None:
    """Refuse a target that no plan reaches, or that is above the uncompressed model.

    Args:
        target: the target.
        ledger: of the budget that the target was resolved to.
        group_size: of the uniform models that `bit` targets mean.

    Raises:
        BudgetError: names the nearest target that works.
    """
    largest = _measure_dense(target, ledger.cost)
    if target.value > target.round_up(largest):
        least = _spell_smallest(target, ledger, group_size)
        raise BudgetError(
            f"the target {target.text} is above the uncompressed model",
            allowed=f"{least} to {target.spell(largest)}",
            hint=_EXAMPLE,
        )
    below_levels = target.kind == "bit" and target.value < LEVELS[0]
    if below_levels or ledger.count_bytes(ledger.find_smallest()) > ledger.limit:
        raise _build_too_small_error(target, ledger, _spell_smallest(target, ledger, group_size))


def _build_too_small_error(target: Target, ledger: Ledger, least: str) -> BudgetError:
    rows = list(ledger.bytes_of.values())
    bits = ", ".join(map(str, sorted({c.bits for row in rows for c in row})))
    differ = len(set(map(tuple, rows))) > 1
    return BudgetError(
        f"the target {target.text} is below the smallest plan of these candidates ({least}: "
        f"candidates of {bits} bits with their scales, and everything that stays dense"
        f"{'; within --pin, --min-bits, --max-bits and --runtime' if differ else ''})",
        allowed=f"{least} and above",
        hint=f"type --target {least}",
    )


def _spell_smallest(target: Target, ledger: Ledger, group_size: int) -> str:
    """Return the smallest target that a plan reaches, in the unit of `target`."""
    need = ledger.count_bytes(ledger.find_smallest())
    return target.spell(_to_target_value(need, target, ledger.cost, group_size))


def _measure_dense(target: Target, cost: CostModel) -> Fraction:
    """Return the value that the uncompressed model has in the target's unit."""
    match target.kind:
        case "bit":
            return Fraction(LEVELS[-1])
        case "bpw":
            return Fraction(8 * cost.weight_bytes({}), cost.compressible)
        case "%":
            return Fraction(100 * cost.dense_bytes, cost.dense_file_bytes)
        case "bytes":
            return Fraction(cost.dense_bytes, target.multiple)


def _to_file_bytes(target: Target, cost: CostModel, group_size: int) -> Fraction:
    if target.kind == "bit":
        return _interpolate(target.value, cost, group_size)
    if target.kind == "%":
        return target.value * cost.dense_file_bytes / 100
    return target.value * target.multiple


def _to_target_value(need: int, target: Target, cost: CostModel, group_size: int) -> Fraction:
    """Return the value of the target whose budget is `need` bytes."""
    match target.kind:
        case "bit":
            return _find_bits(need, cost, group_size)
        case "bpw":
            return Fraction(8 * need, cost.compressible)
        case "%":
            return Fraction(100 * need, cost.dense_file_bytes)
        case "bytes":
            return Fraction(need, target.multiple)


def _interpolate(bits: Fraction, cost: CostModel, group_size: int) -> Fraction:
    """Return the bytes of a uniform model of so many bits, linear between neighbouring levels.

    Below the first and above the last level the line is continued; `check_target` refuses those.
    """
    upper = min(max(bisect_left(LEVELS, bits), 1), len(LEVELS) - 1)
    low, high = LEVELS[upper - 1], LEVELS[upper]
    below, above = (_count_uniform(level, cost, group_size) for level in (low, high))
    return below + (above - below) * (bits - low) / (high - low)


def _find_bits(need: int, cost: CostModel, group_size: int) -> Fraction:
    """Return the bits of the uniform model that takes `need` bytes: `_interpolate` inverted.

    The result lies within the levels: never below the first, never above the last.
    """
    sizes = [_count_uniform(level, cost, group_size) for level in LEVELS]
    for low, high, below, above in zip(LEVELS, LEVELS[1:], sizes, sizes[1:], strict=False):
        if need <= below:
            return Fraction(low)
        if need <= above:
            return low + (high - low) * Fraction(need - below, above - below)
    return Fraction(LEVELS[-1])


def _count_uniform(bits: int, cost: CostModel, group_size: int) -> int:
    """Return the bytes of the uniform model.

    That of the fewest bits counts with the kind of scales that takes most: narrow scales among half
    as many inputs are as many bytes, but their entries in the header are longer, and the smallest
    plan may have no others.
    """
    plain = Candidate(bits=bits, group_size=0 if bits >= 16 else group_size)
    forms = [plain]
    if bits == LEVELS[0] and group_size % 2 == 0:
        kinds = cost.runtime.list_scale_kinds()
        forms += [replace(plain, group_size=group_size // 2, scales=kind) for kind in kinds]
    return max(map(cost.count_uniform_bytes, forms))
