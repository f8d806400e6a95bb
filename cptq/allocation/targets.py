"""What a user asks for, as bytes of the whole file.

| typed      | meaning                                                                          |
|------------|----------------------------------------------------------------------------------|
| `4bit`     | what a uniform 4-bit model takes at the run's group size; `3.5bit` lies half way   |
|            | between 3 and 4, so that mixed and uniform plans meet at equal bytes               |
| `3.5bpw`   | all bytes of the compressible weights, scales included, per compressible weight    |
| `25%`      | of the checkpoint's bytes at 16 bits per weight, whole file                        |
| `120MB`    | whole file; KB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024                   |

A target that no plan reaches is refused together with the nearest one that works.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from cptq.allocation.cost import Choices, CostModel
from cptq.allocation.ledger import Ledger, file_ledger, per_unit, weights_ledger
from cptq.errors import BudgetError
from cptq.types import Budget, Candidate

Kind = Literal["bit", "bpw", "%", "bytes"]
#: what every unit can get, or {unit: what it can get}
Candidates = Sequence[Candidate] | Mapping[str, Sequence[Candidate]]
ALLOWED = "4bit (2bit to 16bit), 3.5bpw, 25%, 120MB (KB, MB, GB, KiB, MiB, GiB)"
#: bits of the uniform models between which `bit` targets interpolate
LEVELS = (2, 3, 4, 5, 6, 7, 8, 16)
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
    """A parsed target: `value` in units of `suffix` (as typed); exact, as 0.1 is no float."""

    value: Fraction
    kind: Kind
    suffix: str
    text: str

    @property
    def multiple(self) -> int:
        """Bytes of one unit of a size target; 1 otherwise."""
        return _MULTIPLES.get(self.suffix.lower(), 1)

    def spell(self, value: Fraction) -> str:
        """A value in this target's unit, rounded up to two decimals or three digits."""
        decimals = 2
        while 0 < value * 10**decimals < 100:
            decimals += 1
        scaled = value * 10**decimals
        whole = math.ceil(scaled)
        text = f"{whole // 10**decimals}.{whole % 10**decimals:0{decimals}d}"
        return text.rstrip("0").rstrip(".") + self.suffix


def parse_target(text: str) -> Target:
    """Read a target such as `4bit`.

    Raises:
        BudgetError: not of a known form, or not above 0.
    """
    match = _PATTERN.fullmatch(text)
    suffix = match[2] if match else ""
    kind = _KINDS.get(suffix.lower()) or ("bytes" if suffix.lower() in _MULTIPLES else None)
    if match is None or kind is None:
        bare = re.fullmatch(r"\s*\d+\.?\d*\s*", text)
        hint = f"did you mean {text.strip()}bit?" if bare else "type for example --target 4bit"
        raise BudgetError(f"{text!r} is no target", allowed=ALLOWED, hint=hint)
    value = Fraction(match[1])
    if value <= 0:
        raise BudgetError(
            f"the target {text.strip()} is not above 0",
            allowed=ALLOWED,
            hint="type for example --target 4bit",
        )
    return Target(value=value, kind=kind, suffix=suffix, text=text.strip())


def resolve_budget(text: str, cost: CostModel, group_size: int, candidates: Candidates) -> Budget:
    """Turn a target into bytes of the whole file.

    Args:
        text: what the user typed.
        cost: the model's bytes.
        group_size: of the uniform models that `bit` targets mean.
        candidates: what every unit can get, or {unit: what it can get}.

    Raises:
        BudgetError: unreadable, below what the smallest plan takes, above the dense file.
    """
    target = parse_target(text)
    if target.kind == "bpw" and not cost.compressible:
        raise BudgetError(
            f"the target {target.text} is about compressible weights and the model has none",
            allowed="a size of the whole file such as 100%",
        )
    _refuse_outside_the_scale(target, cost, group_size, candidates)
    budget = Budget(limit_bytes=_limit(target, cost, group_size, candidates), asked=target.text)
    ledger = ledger_of(budget, cost, candidates)
    if ledger.limit < ledger.exact(smallest_plan(ledger)):
        raise _too_small(target, cost, group_size, candidates)
    return budget


def ledger_of(budget: Budget, cost: CostModel, candidates: Candidates) -> Ledger:
    """The bytes that a budget limits: of the compressible weights for `bpw`, else of the file."""
    table = per_unit(cost, candidates)
    try:
        target = parse_target(budget.asked)
    except BudgetError:  # a plan made by hand may say anything here; the bytes count
        return file_ledger(cost, table, budget.limit_bytes)
    if target.kind == "bpw":
        return weights_ledger(cost, table, _weight_limit(target, cost))
    return file_ledger(cost, table, budget.limit_bytes)


def smallest_plan(ledger: Ledger) -> dict[str, Candidate]:
    """Every unit at the option of fewest bytes."""
    return {
        unit: min(options, key=lambda c: (options[c], c))
        for unit, options in ledger.bytes_of.items()
    }


def _weight_limit(target: Target, cost: CostModel) -> int:
    return math.floor(target.value * cost.compressible / 8)


def _limit(target: Target, cost: CostModel, group_size: int, candidates: Candidates) -> int:
    if target.kind == "bytes":
        return math.floor(target.value * target.multiple)
    if target.kind == "%":
        return math.floor(target.value * cost.dense_file_bytes / 100)
    if target.kind == "bit":
        return math.floor(_interpolate(target.value, cost, group_size))
    return _weight_limit(target, cost) + _most_beside_weights(cost, candidates)


def _most_beside_weights(cost: CostModel, candidates: Candidates) -> int:
    """What the file can hold beside the tensors of the units: other tensors and headers."""
    ledger = file_ledger(cost, per_unit(cost, candidates), 0)
    return ledger.base + sum(
        max(nbytes - cost.unit_bytes(unit, c) for c, nbytes in options.items())
        for unit, options in ledger.bytes_of.items()
    )


def _interpolate(bits: Fraction, cost: CostModel, group_size: int) -> Fraction:
    """Bytes of a uniform model of so many bits, linear between the levels."""
    low = max(level for level in LEVELS if level <= bits)
    high = min(level for level in LEVELS if level >= bits)
    below, above = (_uniform_bytes(level, cost, group_size) for level in (low, high))
    share = (bits - low) / (high - low) if high > low else Fraction(0)
    return below + share * (above - below)


def _uniform_bytes(bits: int, cost: CostModel, group_size: int) -> int:
    dense = bits >= 16
    return cost.uniform_bytes(Candidate(bits=bits, group_size=0 if dense else group_size))


def _refuse_outside_the_scale(
    target: Target, cost: CostModel, group_size: int, candidates: Candidates
) -> None:
    """Targets above the dense file, or outside the bits that exist."""
    if target.kind == "bit" and target.value < LEVELS[0]:
        raise _too_small(target, cost, group_size, candidates)
    most = {
        "bit": Fraction(LEVELS[-1]),
        "bpw": Fraction(8 * cost.weight_bytes({}), max(1, cost.compressible)),
        "%": Fraction(100 * cost.dense_bytes, cost.dense_file_bytes),
        "bytes": Fraction(cost.dense_bytes, target.multiple),
    }[target.kind]
    ceiling = target.spell(most)
    if target.value > parse_target(ceiling).value:
        least = _smallest(target, cost, group_size, candidates)
        raise BudgetError(
            f"the target {target.text} is above the uncompressed model",
            allowed=f"{least} to {ceiling}",
            hint="type for example --target 4bit",
        )


def _too_small(
    target: Target, cost: CostModel, group_size: int, candidates: Candidates
) -> BudgetError:
    least = _smallest(target, cost, group_size, candidates)
    options = per_unit(cost, candidates)
    bits = ", ".join(map(str, sorted({c.bits for row in options.values() for c in row})))
    held = isinstance(candidates, Mapping) and len(set(map(tuple, options.values()))) > 1
    return BudgetError(
        f"the target {target.text} is below the smallest that these candidates reach ({least}: "
        f"candidates of {bits} bits with their scales, and all that stays dense"
        f"{'; --pin, --min-bits and --max-bits kept to' if held else ''})",
        allowed=f"{least} and above",
        hint=f"type --target {least}",
    )


def _smallest(target: Target, cost: CostModel, group_size: int, candidates: Candidates) -> str:
    """The smallest target that works, in the unit of `target`."""
    plan = smallest_plan(file_ledger(cost, per_unit(cost, candidates), 0))
    return target.spell(_least_value(target, cost, group_size, plan))


def _least_value(target: Target, cost: CostModel, group_size: int, plan: Choices) -> Fraction:
    if target.kind == "bpw":
        return Fraction(8 * cost.weight_bytes(plan), max(1, cost.compressible))
    need = cost.file_bytes(plan)
    if target.kind == "%":
        return Fraction(100 * need, cost.dense_file_bytes)
    return (
        Fraction(need, target.multiple)
        if target.kind == "bytes"
        else _bits_of(need, cost, group_size)
    )


def _bits_of(need: int, cost: CostModel, group_size: int) -> Fraction:
    """The inverse of `_interpolate`, within the levels."""
    sizes = [_uniform_bytes(level, cost, group_size) for level in LEVELS]
    for low, high, below, above in zip(LEVELS, LEVELS[1:], sizes, sizes[1:], strict=False):
        if need <= below:
            return Fraction(low)
        if need <= above:
            return low + (high - low) * Fraction(need - below, above - below)
    return Fraction(LEVELS[-1])
