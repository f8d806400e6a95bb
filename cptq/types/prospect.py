"""What `compress` would do with a checkpoint, known before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class ProspectPart:
    """Layers or tensors of one fate: `what` they are, `fate` what becomes of them.

    `packed`: they are compressed. `example` names the first one, `nbytes` is what they take now.
    """

    what: str
    fate: str
    packed: bool
    tensors: int
    nbytes: int
    example: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prospect:
    """What `compress` would do. With a `refusal` it would do nothing, and all else is empty.

    `groups` is {fused group: (its roles, number of such units)}, `runtimes` {name: (whether it
    takes the result, in words)}, `notes` say what could not be found out.
    """

    refusal: str | None = None
    kind: str = ""
    family: str = ""
    blocks: int = 0
    parts: tuple[ProspectPart, ...] = ()
    groups: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    runtimes: Mapping[str, tuple[bool, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
