"""Candidates, their scores, and the choice among them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


def digest(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of a plain value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Candidate:
    """One way to store a unit. `bits` 16 keeps it dense; `group_size` 0 means one per channel."""

    bits: int
    group_size: int = 0
    symmetric: bool = True
    sparsity: float = 0.0
    pattern: str = "none"

    @property
    def dense(self) -> bool:
        return self.bits >= 16

    @property
    def label(self) -> str:
        """A short name: `w4g64`, `w4c` (per channel), `w3g64-asym`, `w4c-s50`, `w4c-2:4`, `w16`."""
        if self.dense:
            return "w16"
        grid = f"w{self.bits}" + (f"g{self.group_size}" if self.group_size else "c")
        grid += "" if self.symmetric else "-asym"
        if ":" in self.pattern:
            return f"{grid}-{self.pattern}"
        return grid + (f"-s{round(100 * self.sparsity)}" if self.sparsity else "")

    @classmethod
    def parse(cls, label: str) -> Candidate:
        """The inverse of `label`.

        Raises:
            ValueError: the text is no label.
        """
        if label == "w16":
            return cls(bits=16)
        match = re.fullmatch(r"w([2-8])(?:g(\d+)|c)(-asym)?(?:-s(\d+)|-(2:4))?", label)
        if match is None:
            raise ValueError(f"{label!r} is no candidate label (such as w4g64, w4c, w16)")
        bits, group, asym, sparsity, pattern = match.groups()
        return cls(
            bits=int(bits),
            group_size=int(group or 0),
            symmetric=asym is None,
            sparsity=0.5 if pattern else int(sparsity or 0) / 100,
            pattern=pattern or ("unstructured" if sparsity else "none"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityTable:
    """Scores of one metric: {unit name: {candidate: score}}, higher = worse if compressed.

    `per_unit` is the metric's own candidate-free number (1 - mean rho for cca, and so on) and
    `per_block` its sum or mean over a block. `details` says whatever a reader must know. `seconds`
    is the wall time of the run that measured the table: shared passes and all metrics of that run,
    so it is the metric's own cost only if it was measured alone (`scripts/bench_sensitivity`).
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
    seconds: float
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; candidates become their labels."""
        data = {name: getattr(self, name) for name in self.__slots__}
        data["scores"] = {
            unit: {candidate.label: score for candidate, score in row.items()}
            for unit, row in self.scores.items()
        }
        data["per_block"] = {str(block): score for block, score in self.per_block.items()}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SensitivityTable:
        """The inverse of `to_dict`."""
        fields = dict(data)
        fields["scores"] = {
            unit: {Candidate.parse(label): float(score) for label, score in row.items()}
            for unit, row in data["scores"].items()
        }
        fields["per_block"] = {int(block): score for block, score in data["per_block"].items()}
        return cls(**fields)

    @property
    def digest(self) -> str:
        """sha256 of the scores and of what they were measured on (not of the seconds)."""
        data = self.to_dict()
        data.pop("seconds")
        return digest(data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bytes that the whole weight file may take, and the words that were turned into them."""

    limit_bytes: int
    asked: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What each unit gets; output of any allocator, input of compress, editable by hand.

    `embedding`: what token embeddings and an output head of its own get; None keeps them dense.
    """

    model_fingerprint: str
    budget: Budget
    allocator: str
    metric: str | None
    table_digest: str | None
    choices: Mapping[str, Candidate]
    predicted_bytes: int
    predicted_loss: float | None
    notes: tuple[str, ...] = ()
    embedding: Candidate | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; candidates become their labels."""
        data = {name: getattr(self, name) for name in self.__slots__}
        data["budget"] = asdict(self.budget)
        data["choices"] = {unit: choice.label for unit, choice in self.choices.items()}
        data["notes"] = list(self.notes)
        data["embedding"] = None if self.embedding is None else self.embedding.label
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`.

        Raises:
            ValueError, KeyError, TypeError: the data is no plan.
        """
        fields = dict(data)
        fields["budget"] = Budget(**data["budget"])
        fields["choices"] = {unit: Candidate.parse(c) for unit, c in data["choices"].items()}
        fields["notes"] = tuple(data.get("notes", ()))
        if data.get("embedding") is not None:
            fields["embedding"] = Candidate.parse(data["embedding"])
        return cls(**fields)
