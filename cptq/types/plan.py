"""Candidates, sensitivity scores, budgets and plans."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from cptq.errors import PlanError

#: what a budget limits: the whole weight file, or the compressible weights as stored
Scope = Literal["file", "weights"]
#: the largest M of a pattern N:M: its places then have at most C(8, 4) = 70 orders, 7 bits
MOST_OF = 8
#: the kind of scales of ggml's K-quants (`numerics.super_scales`)
SUPER_SCALES = "k"


def digest(value: Any) -> str:
    """Return the sha256 (hex) of the canonical JSON of a plain value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Candidate:
    """One way to store a unit.

    `bits` 16 keeps the unit dense. `group_size` 0 means one scale per output channel. `float8`
    stores 8-bit floats without scales, "e4m3" or "e5m2"; then `bits` is 8. `scales` names a narrow
    way to store scales (`numerics.scale_grids`, `numerics.super_scales`); empty: 16 bits each.
    `levels` names a table of unevenly spaced levels (`layouts.levels`); empty: even spacing.
    `sparsity` is the share of zeros, `pattern` where they lie: "none", "unstructured", or "N:M".
    """

    bits: int
    group_size: int = 0
    symmetric: bool = True
    sparsity: float = 0.0
    pattern: str = "none"
    float8: str = ""
    scales: str = ""
    levels: str = ""

    @property
    def dense(self) -> bool:
        return self.bits >= 16

    @property
    def narrow_scales(self) -> str:
        """The kind of `scales` in a safetensors file, where `k` scales are 16-bit numbers: they are
        narrow in a GGUF file alone."""
        return "" if self.scales == SUPER_SCALES else self.scales

    @property
    def kept_of(self) -> tuple[int, int] | None:
        """(N, M) where N of every M neighbouring inputs are stored, else None."""
        kept, colon, of = self.pattern.partition(":")
        return (int(kept), int(of)) if colon else None

    @property
    def label(self) -> str:
        """Short name: `w4g64`, `w4c` (per channel), `w3g64-asym`, `w4g32-row`,
        `w4g32-nl-row`, `w4g32-iq4nl`, `w6g16-k`, `w4c-s50`, `w16`, `w4c-2:4`, `f8e4m3`."""
        if self.dense:
            return "w16"
        if self.float8:
            return f"f8{self.float8}"
        grid = f"w{self.bits}" + (f"g{self.group_size}" if self.group_size else "c")
        grid += "" if self.symmetric else "-asym"
        grid += f"-{self.levels}" if self.levels else ""
        grid += f"-{self.scales}" if self.scales else ""
        if ":" in self.pattern:
            return f"{grid}-{self.pattern}"
        return grid + (f"-s{round(100 * self.sparsity)}" if self.sparsity else "")

    @classmethod
    def parse(cls, label: str) -> Candidate:
        """Read a label; the inverse of `label`.

        Raises:
            ValueError: the text is not a candidate label.
        """
        if label == "w16":
            return cls(bits=16)
        if label in ("f8e4m3", "f8e5m2"):
            return cls(bits=8, float8=label.removeprefix("f8"))
        match = re.fullmatch(
            r"w([2-8])(?:g(\d+)|c)(-asym)?(?:-(nl|iq4nl))?(?:-(row|k|e4m3|e5m2))?"
            r"(?:-s(\d+)|-(\d:\d))?",
            label,
        )
        if match is None or (match[7] and not _is_pattern(match[7])):
            raise ValueError(
                f"invalid candidate label {label!r} (valid: w4g64, w4c, w16, f8e4m3, ...)"
            )
        bits, group, asym, levels, scales, sparsity, pattern = match.groups()
        return cls(
            bits=int(bits),
            group_size=int(group or 0),
            symmetric=asym is None,
            sparsity=compute_share(pattern) if pattern else int(sparsity or 0) / 100,
            pattern=pattern or ("unstructured" if sparsity else "none"),
            scales=scales or "",
            levels=levels or "",
        )


def _is_pattern(pattern: str) -> bool:
    kept, of = map(int, pattern.split(":"))
    return 1 <= kept < of <= MOST_OF


def compute_share(pattern: str) -> float:
    """Return the share of zeros of N:M."""
    kept, of = map(int, pattern.split(":"))
    return 1 - kept / of


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityTable:
    """Scores of one metric: {unit name: {candidate: score}}; higher means more damage.

    `per_unit` is the metric's own number of a unit, independent of the candidate (1 - mean rho for
    cca, for example); `per_block` is its sum or mean over a block. `details` holds further facts
    about the measurement. `seconds` is the wall time of the run that measured the table: shared
    passes and all metrics of that run, so it is the metric's own cost only if it was measured alone
    (`scripts/bench_sensitivity`), and of a resumed run that of its last part. 0 where it is not
    known: reports alone hold it.
    """

    metric: str
    score_unit: str
    scores: Mapping[str, Mapping[Candidate, float]]
    per_unit: Mapping[str, float]
    per_block: Mapping[int, float]
    model_fingerprint: str
    calibration_fingerprint: str
    seed: int
    tokens: int
    seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; candidates become their labels."""
        data = {name: getattr(self, name) for name in self.__slots__}
        data["scores"] = {
            unit: {candidate.label: score for candidate, score in row.items()}
            for unit, row in self.scores.items()
        }
        data["per_block"] = {str(block): score for block, score in self.per_block.items()}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SensitivityTable:
        """Read a table from plain data; the inverse of `to_dict`."""
        fields = dict(data)
        fields["scores"] = {
            unit: {Candidate.parse(label): float(score) for label, score in row.items()}
            for unit, row in data["scores"].items()
        }
        fields["per_block"] = {int(block): score for block, score in data["per_block"].items()}
        return cls(**fields)

    @property
    def digest(self) -> str:
        """The sha256 of everything in the table except `seconds`."""
        data = self.to_dict()
        data.pop("seconds")
        return digest(data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A limit in bytes, what it limits, and the target as typed.

    `scope` "file" limits all bytes of the weight file (or of its shards together). "weights"
    limits the bytes of the compressible weights as stored (codes, scales, shapes, those kept
    dense), which is what a target in bpw sets.
    """

    limit_bytes: int
    asked: str
    scope: Scope = "file"

    @property
    def limit_text(self) -> str:
        """The limit for messages: `1,234 bytes` or `1,234 bytes of compressible weights`."""
        suffix = "" if self.scope == "file" else " of compressible weights"
        return f"{self.limit_bytes:,} bytes{suffix}"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Budget:
        """Read a budget from plain data.

        Files written before `scope` existed lack it. Their `limit_bytes` is a bound of the whole
        file for every target, bpw included, so they are read with scope "file".

        Raises:
            ValueError, TypeError: a field is missing, unknown or invalid.
        """
        budget = cls(**data)
        if not isinstance(budget.limit_bytes, int):
            raise ValueError(f"invalid limit_bytes {budget.limit_bytes!r} (valid: a whole number)")
        if budget.scope not in get_args(Scope):
            allowed = " or ".join(map(repr, get_args(Scope)))
            raise ValueError(f"invalid budget scope {budget.scope!r} (valid: {allowed})")
        return budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One candidate per unit: written by every allocator, read by compress, editable by hand."""

    model_fingerprint: str
    budget: Budget
    allocator: str
    metric: str | None
    table_digest: str | None
    choices: Mapping[str, Candidate]
    predicted_bytes: int
    predicted_loss: float | None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; candidates become their labels."""
        data = {name: getattr(self, name) for name in self.__slots__}
        data["budget"] = asdict(self.budget)
        data["choices"] = {unit: choice.label for unit, choice in self.choices.items()}
        data["notes"] = list(self.notes)
        return data

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a file that `save` or `cptq compress` wrote.

        Raises:
            PlanError: there is no such file, or it does not hold a plan.
        """
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            reason = (error.strerror or "cannot be read").lower()
            raise PlanError(
                f"the plan {path} cannot be read: {reason}",
                hint="give --plan a plan.json that `cptq compress` wrote",
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            hint = "`cptq compress` writes a plan.json that can be edited"
            raise PlanError(f"{path} is not a valid plan: {error}", hint=hint) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, to be edited and to be given to `cptq compress --plan`."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Read a plan from plain data; the inverse of `to_dict`.

        Raises:
            ValueError, KeyError, TypeError: the data does not describe a plan.
        """
        fields = dict(data)
        fields["budget"] = Budget.from_dict(data["budget"])
        fields["choices"] = {unit: Candidate.parse(c) for unit, c in data["choices"].items()}
        fields["notes"] = tuple(data.get("notes", ()))
        if fields.pop("embedding", None) is not None:
            raise ValueError(
                "an earlier cptq wrote it, with one choice for embeddings and output head outside "
                "the plan; now they are units of the plan"
            )
        return cls(**fields)
