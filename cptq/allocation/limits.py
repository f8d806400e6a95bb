"""What a user fixes by hand: pins of single units, least and largest bits of roles.

    --pin 'down_proj=8bit'    units that the regular expression finds get exactly this
    --min-bits down=4         no unit of this role gets fewer; without a role: no unit at all
    --max-bits 6              ... or more

The result is one list of candidates per unit; allocators choose from those and need to know no
more. A pin wins over --min-bits and --max-bits: it is the more particular word. An expression is
searched for (`re.search`) in the names of units and of the layers in them; a unit that is found by
one of its layers is pinned as a whole, since runtimes fuse it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from cptq.errors import BudgetError, PlanError, UsageError
from cptq.registry import find_closest
from cptq.types import Candidate, Emit, LayerSpec, Notice, Unit

Options = Mapping[str, Sequence[Candidate]]
"""{unit name: the candidates that it may have}."""

PIN_BITS = (2, 3, 4, 5, 6, 7, 8, 16)
_PIN = "regex=8bit, such as 'down_proj=8bit' or 'layers\\.0\\.=16bit'"
_ROLE = "a number, or role=number, such as 4 or down=4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """Units whose names `pattern` finds get `bits` bits."""

    pattern: str
    bits: int

    @property
    def text(self) -> str:
        """As it is typed."""
        return f"{self.pattern}={self.bits}bit"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleBits:
    """A number of bits for the units of a role; None is all of them."""

    role: str | None
    bits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """All that is fixed by hand."""

    pins: tuple[Pin, ...] = ()
    least: tuple[RoleBits, ...] = ()
    most: tuple[RoleBits, ...] = ()


def parse_limits(pins: Sequence[str], least: Sequence[str], most: Sequence[str]) -> Limits:
    """The words of --pin, --min-bits and --max-bits; needs no model.

    Raises:
        UsageError: one cannot be read, or a role has two numbers.
    """
    return Limits(
        pins=tuple(map(parse_pin, pins)),
        least=_parse_roles("--min-bits", least),
        most=_parse_roles("--max-bits", most),
    )


def parse_pin(text: str) -> Pin:
    """`regex=8bit`.

    Raises:
        UsageError: it is not of that form, its expression or its number cannot be used.
    """
    pattern, equals, word = text.rpartition("=")
    match = re.fullmatch(r"\s*(\d+)\s*(?:bits?)?\s*", word, re.IGNORECASE)
    if not equals or not pattern.strip() or match is None:
        raise UsageError(f"--pin {text!r} cannot be read", allowed=_PIN)
    if int(match[1]) not in PIN_BITS:
        allowed = ", ".join(map(str, PIN_BITS))
        raise UsageError(f"--pin {text!r} asks for {match[1]} bits", allowed=allowed)
    try:
        re.compile(pattern.strip())
    except re.error as error:
        raise UsageError(
            f"--pin {text!r} is no regular expression: {error}", allowed=_PIN
        ) from error
    return Pin(pattern=pattern.strip(), bits=int(match[1]))


def _parse_roles(option: str, words: Sequence[str]) -> tuple[RoleBits, ...]:
    found: dict[str | None, RoleBits] = {}
    for word in words:
        role, equals, number = word.rpartition("=")
        match = re.fullmatch(r"\s*(\d+)\s*(?:bits?)?\s*", number, re.IGNORECASE)
        if match is None or (equals and not role.strip()) or not 2 <= int(match[1]) <= 16:
            raise UsageError(f"{option} {word!r} cannot be read", allowed=f"{_ROLE}; 2 to 16")
        key = role.strip() or None
        known = found.setdefault(key, RoleBits(role=key, bits=int(match[1])))
        if known.bits != int(match[1]):
            raise UsageError(f"{option} says both {known.bits} and {match[1]} for {key or 'all'}")
    return tuple(found.values())


def allowed(
    limits: Limits,
    units: Sequence[Unit],
    candidates: Sequence[Candidate],
    *,
    group_size: int,
    asymmetric: Collection[int] = (),
    layers: Sequence[LayerSpec] = (),
    emit: Emit,
) -> dict[str, tuple[Candidate, ...]]:
    """The candidates that each unit may have.

    Args:
        limits: what is fixed by hand.
        units: the compressible units.
        candidates: what a unit gets that nothing is said about.
        group_size: of a pinned unit whose bits are not among the candidates.
        asymmetric: bits that such a unit has on an asymmetric grid.
        layers: all layers, for the message when a pin finds only ones that stay dense.
        emit: told which units a pin reaches beyond the layers that it names.

    Raises:
        PlanError: a pin finds nothing, or two pins disagree about a unit.
        UsageError: an unknown role.
        BudgetError: nothing is left for a unit.
    """
    _check_roles(limits, units)
    pinned = _pinned(limits.pins, units, layers, emit)
    options = {}
    for unit in units:
        pin = pinned.get(unit.name)
        kept = tuple(c for c in candidates if _least(limits, unit) <= c.bits <= _most(limits, unit))
        options[unit.name] = (
            kept if pin is None else (_candidate(pin, candidates, group_size, asymmetric),)
        )
        if not options[unit.name]:
            raise _nothing_left(limits, unit, candidates)
    return options


def _candidate(
    pin: Pin, candidates: Sequence[Candidate], group_size: int, asymmetric: Collection[int]
) -> Candidate:
    symmetric = pin.bits not in asymmetric
    group = 0 if pin.bits == 16 else group_size
    made = Candidate(bits=pin.bits, group_size=group, symmetric=symmetric)
    return next((c for c in candidates if c.bits == pin.bits), made)


def roles_of(unit: Unit) -> list[str]:
    """The role of a unit and those of its layers: `qkv`, `q`, `k`, `v`."""
    return list(dict.fromkeys([unit.role, *(layer.role for layer in unit.layers)]))


def _check_roles(limits: Limits, units: Sequence[Unit]) -> None:
    known = list(dict.fromkeys(role for unit in units for role in roles_of(unit)))
    for option, rows in (("--min-bits", limits.least), ("--max-bits", limits.most)):
        for row in rows:
            if row.role is not None and row.role not in known:
                near = find_closest(row.role, known)
                raise UsageError(
                    f"{option} names the role {row.role!r}, and this model has none of that name",
                    allowed=", ".join(known),
                    hint=f"did you mean {near!r}?" if near else None,
                )


def _least(limits: Limits, unit: Unit) -> int:
    return max(_of(limits.least, unit), default=0)


def _most(limits: Limits, unit: Unit) -> int:
    return min(_of(limits.most, unit), default=16)


def _of(rows: Sequence[RoleBits], unit: Unit) -> list[int]:
    """The numbers that are about a unit; one for its role counts, not the one for all."""
    own = [row.bits for row in rows if row.role in roles_of(unit)]
    return own or [row.bits for row in rows if row.role is None]


def _nothing_left(limits: Limits, unit: Unit, candidates: Sequence[Candidate]) -> BudgetError:
    least, most = _least(limits, unit), _most(limits, unit)
    widths = ", ".join(str(bits) for bits in sorted({c.bits for c in candidates}))
    return BudgetError(
        f"nothing is left for {unit.name}: --min-bits and --max-bits leave {least} to {most} bits, "
        f"and the candidates have {widths}",
        hint="change --min-bits or --max-bits, or add to --bits",
    )


def _pinned(
    pins: Sequence[Pin], units: Sequence[Unit], layers: Sequence[LayerSpec], emit: Emit
) -> dict[str, Pin]:
    """{unit name: its pin}."""
    found: dict[str, Pin] = {}
    for pin in pins:
        reached = [unit for unit in units if _finds(pin, unit)]
        if not reached:
            raise _finds_nothing(pin, units, layers)
        for unit in reached:
            other = found.setdefault(unit.name, pin)
            if other.bits != pin.bits:
                raise PlanError(
                    f"--pin {other.text!r} and --pin {pin.text!r} both find {unit.name}",
                    hint="make one of the expressions narrower",
                )
        _tell_fused(pin, reached, emit)
    return found


def _finds(pin: Pin, unit: Unit) -> bool:
    return any(re.search(pin.pattern, name) for name in _names(unit))


def _names(unit: Unit) -> list[str]:
    return [unit.name, *(layer.name for layer in unit.layers)]


def _tell_fused(pin: Pin, reached: Sequence[Unit], emit: Emit) -> None:
    """A word on layers that are pinned only because they are fused with one that was named."""
    beside = [
        layer.name.rpartition(".")[2]
        for unit in reached
        if not re.search(pin.pattern, unit.name)
        for layer in unit.layers
        if not re.search(pin.pattern, layer.name)
    ]
    if beside:
        names = ", ".join(dict.fromkeys(beside))
        message = f"reaches {names} as well, which are fused with what it names"
        emit(Notice(kind="info", subject=f"--pin {pin.text}", message=message))


def _finds_nothing(pin: Pin, units: Sequence[Unit], layers: Sequence[LayerSpec]) -> PlanError:
    dense = [layer for layer in layers if re.search(pin.pattern, layer.name)]
    if dense:
        return PlanError(
            f"--pin {pin.text!r} finds only {dense[0].name}, which stays dense "
            f"({dense[0].reason or dense[0].kind})",
        )
    names = [name for unit in units for name in _names(unit)]
    words = list(dict.fromkeys([*(part for n in names for part in n.split(".")), *names]))
    near = find_closest(re.sub(r"[^\w.]", "", pin.pattern.replace("\\", "")), words)
    return PlanError(
        f"--pin {pin.text!r} finds no unit",
        allowed=f"an expression found in a name such as {', '.join(names[:2])}",
        hint=f"did you mean {near!r}?" if near else None,
    )
