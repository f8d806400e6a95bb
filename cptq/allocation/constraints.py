"""Constraints: widths that the user fixes for single units, and least and most bits of roles.

    --pin 'down_proj=8bit'    units found by the regular expression get exactly 8 bits
    --min-bits down=4         no unit of this role gets fewer; without a role: no unit at all
    --max-bits 6              no unit gets more

The result is one list of candidates per unit. Allocators choose from those lists and know nothing
else of constraints. A pin overrides --min-bits and --max-bits, as it is more specific. Expressions
are searched for (`re.search`) in the names of units and of their layers; a unit found by one of its
layers is pinned as a whole, since runtimes fuse it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from cptq.errors import BudgetError, PlanError, UsageError
from cptq.registry import find_closest
from cptq.types import Candidate, Emit, LayerSpec, Notice, Unit

PIN_BITS = (2, 3, 4, 5, 6, 7, 8, 16)
_PIN = "regex=8bit, such as 'down_proj=8bit' or 'layers\\.0\\.=16bit'"
_ROLE = "a number, or role=number, such as 4 or down=4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """A width for the units whose names match `pattern`."""

    pattern: str
    bits: int

    @property
    def text(self) -> str:
        """The pin as it is typed."""
        return f"{self.pattern}={self.bits}bit"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleBits:
    """A number of bits for the units of a role; for all units where the role is None."""

    role: str | None
    bits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """All constraints of a run: --pin, --min-bits, --max-bits."""

    pins: tuple[Pin, ...] = ()
    min_bits: tuple[RoleBits, ...] = ()
    max_bits: tuple[RoleBits, ...] = ()


def parse_constraints(
    pins: Sequence[str], min_bits: Sequence[str], max_bits: Sequence[str]
) -> Constraints:
    """Read the values of --pin, --min-bits and --max-bits; needs no model.

    Raises:
        UsageError: a value cannot be read, or a role has two numbers.
    """
    return Constraints(
        pins=tuple(map(parse_pin, pins)),
        min_bits=_parse_roles("--min-bits", min_bits),
        max_bits=_parse_roles("--max-bits", max_bits),
    )


def parse_pin(text: str) -> Pin:
    """Read a pin such as `regex=8bit`.

    Raises:
        UsageError: it has another form, or its expression or number is invalid.
    """
    pattern, equals, number = text.rpartition("=")
    match = re.fullmatch(r"\s*(\d+)\s*(?:bits?)?\s*", number, re.IGNORECASE)
    if not equals or not pattern.strip() or match is None:
        raise UsageError(f"invalid --pin {text!r}", allowed=_PIN)
    if int(match[1]) not in PIN_BITS:
        allowed = ", ".join(map(str, PIN_BITS))
        raise UsageError(f"--pin {text!r} sets {match[1]} bits", allowed=allowed)
    try:
        re.compile(pattern.strip())
    except re.error as error:
        raise UsageError(
            f"--pin {text!r} is not a valid regular expression: {error}", allowed=_PIN
        ) from error
    return Pin(pattern=pattern.strip(), bits=int(match[1]))


def _parse_roles(option: str, values: Sequence[str]) -> tuple[RoleBits, ...]:
    found: dict[str | None, RoleBits] = {}
    for value in values:
        role, equals, number = value.rpartition("=")
        match = re.fullmatch(r"\s*(\d+)\s*(?:bits?)?\s*", number, re.IGNORECASE)
        if match is None or (equals and not role.strip()) or not 2 <= int(match[1]) <= 16:
            raise UsageError(f"invalid {option} {value!r}", allowed=f"{_ROLE}; 2 to 16")
        key = role.strip() or None
        known = found.setdefault(key, RoleBits(role=key, bits=int(match[1])))
        if known.bits != int(match[1]):
            raise UsageError(
                f"{option} sets both {known.bits} and {match[1]} for {key or 'all units'}"
            )
    return tuple(found.values())


def apply_constraints(
    constraints: Constraints,
    units: Sequence[Unit],
    candidates: Sequence[Candidate],
    *,
    offered: Mapping[str, Sequence[Candidate]] | None = None,
    group_size: int,
    asymmetric: Collection[int] = (),
    layers: Sequence[LayerSpec] = (),
    emit: Emit,
) -> dict[str, tuple[Candidate, ...]]:
    """Return the candidates that each unit can have.

    Args:
        constraints: what the user fixed.
        units: the compressible units.
        candidates: those of a unit without constraints.
        offered: {unit: its own candidates}, of units that have others. Limits without a role that
            leave none of those do not count: they are meant for what can be so narrow or wide.
        group_size: of a pinned unit whose bits are not among the candidates.
        asymmetric: bits that such a unit has on an asymmetric grid.
        layers: all layers, for the message when a pin finds only layers that stay dense.
        emit: receives a notice when a pin also changes layers that it does not name.

    Raises:
        PlanError: a pin finds no unit, or two pins set different bits for a unit.
        UsageError: a role is unknown.
        BudgetError: no candidate is left for a unit.
    """
    _check_roles(constraints, units)
    pinned = _match_pins(constraints.pins, units, layers, emit)
    options: dict[str, tuple[Candidate, ...]] = {}
    for unit in units:
        pin, row = pinned.get(unit.name), (offered or {}).get(unit.name, candidates)
        if pin is not None:
            options[unit.name] = (_find_candidate(pin, row, group_size, asymmetric),)
            continue
        least, most = _find_range(constraints, unit)
        options[unit.name] = tuple(c for c in row if least <= c.bits <= most)
        if not options[unit.name]:
            if row is candidates or _has_own_range(constraints, unit):
                raise _build_empty_error(constraints, unit, row)
            options[unit.name] = tuple(row)
    return options


def _find_candidate(
    pin: Pin, candidates: Sequence[Candidate], group_size: int, asymmetric: Collection[int]
) -> Candidate:
    """Return the candidate of a pin's bits, a new one where none is offered."""
    symmetric = pin.bits not in asymmetric
    group = 0 if pin.bits == 16 else group_size
    made = Candidate(bits=pin.bits, group_size=group, symmetric=symmetric)
    return next((c for c in candidates if c.bits == pin.bits), made)


def list_roles(unit: Unit) -> list[str]:
    """Return the role of a unit and those of its layers: `qkv`, `q`, `k`, `v`; of a matrix that is
    both, `embedding` and `head`."""
    own = unit.role.split("+") if unit.block is None else [unit.role]
    return list(dict.fromkeys([*own, *(layer.role for layer in unit.layers)]))


def _check_roles(constraints: Constraints, units: Sequence[Unit]) -> None:
    known = list(dict.fromkeys(role for unit in units for role in list_roles(unit)))
    for option, rows in (
        ("--min-bits", constraints.min_bits),
        ("--max-bits", constraints.max_bits),
    ):
        for row in rows:
            if row.role is not None and row.role not in known:
                near = find_closest(row.role, known)
                raise UsageError(
                    f"{option} names the role {row.role!r}, which this model does not have",
                    allowed=", ".join(known),
                    hint=f"did you mean {near!r}?" if near else None,
                )


def _find_range(constraints: Constraints, unit: Unit) -> tuple[int, int]:
    """Return the least and the most bits of a unit."""
    least = max(_list_bits(constraints.min_bits, unit), default=0)
    most = min(_list_bits(constraints.max_bits, unit), default=16)
    return least, most


def _list_bits(rows: Sequence[RoleBits], unit: Unit) -> list[int]:
    """Return the numbers set for a unit: those of its roles, else those of all units."""
    own = [row.bits for row in rows if row.role in list_roles(unit)]
    return own or [row.bits for row in rows if row.role is None]


def _has_own_range(constraints: Constraints, unit: Unit) -> bool:
    """Whether a limit names a role of the unit."""
    rows = (*constraints.min_bits, *constraints.max_bits)
    return any(row.role in list_roles(unit) for row in rows)


def _build_empty_error(
    constraints: Constraints, unit: Unit, candidates: Sequence[Candidate]
) -> BudgetError:
    least, most = _find_range(constraints, unit)
    widths = ", ".join(str(bits) for bits in sorted({c.bits for c in candidates}))
    return BudgetError(
        f"no candidate is left for {unit.name}: --min-bits and --max-bits allow {least} to {most} "
        f"bits, and the candidates have {widths}",
        hint="change --min-bits or --max-bits, or add to --bits",
    )


def _match_pins(
    pins: Sequence[Pin], units: Sequence[Unit], layers: Sequence[LayerSpec], emit: Emit
) -> dict[str, Pin]:
    """Return {unit name: its pin}."""
    found: dict[str, Pin] = {}
    for pin in pins:
        matched = [unit for unit in units if _matches(pin, unit)]
        if not matched:
            raise _build_unmatched_error(pin, units, layers)
        for unit in matched:
            other = found.setdefault(unit.name, pin)
            if other.bits != pin.bits:
                raise PlanError(
                    f"--pin {other.text!r} and --pin {pin.text!r} both match {unit.name}",
                    hint="make one of the expressions narrower",
                )
        _report_fused(pin, matched, emit)
    return found


def _matches(pin: Pin, unit: Unit) -> bool:
    return any(re.search(pin.pattern, name) for name in _list_names(unit))


def _list_names(unit: Unit) -> list[str]:
    return [unit.name, *(layer.name for layer in unit.layers)]


def _report_fused(pin: Pin, matched: Sequence[Unit], emit: Emit) -> None:
    """Report layers that are pinned only because they are fused with a matched layer."""
    beside = [
        layer.name.rpartition(".")[2]
        for unit in matched
        if not re.search(pin.pattern, unit.name)
        for layer in unit.layers
        if not re.search(pin.pattern, layer.name)
    ]
    if beside:
        names = ", ".join(dict.fromkeys(beside))
        message = f"also pins {names}, which are fused with the layers that it matches"
        emit(Notice(kind="info", subject=f"--pin {pin.text}", message=message))


def _build_unmatched_error(
    pin: Pin, units: Sequence[Unit], layers: Sequence[LayerSpec]
) -> PlanError:
    dense = [layer for layer in layers if re.search(pin.pattern, layer.name)]
    if dense:
        return PlanError(
            f"--pin {pin.text!r} matches only {dense[0].name}, which stays dense "
            f"({dense[0].reason or dense[0].kind})",
        )
    names = [name for unit in units for name in _list_names(unit)]
    words = list(dict.fromkeys([*(part for n in names for part in n.split(".")), *names]))
    near = find_closest(re.sub(r"[^\w.]", "", pin.pattern.replace("\\", "")), words)
    return PlanError(
        f"--pin {pin.text!r} matches no unit",
        allowed=f"an expression that matches a name such as {', '.join(names[:2])}",
        hint=f"did you mean {near!r}?" if near else None,
    )
