"""The nouns: immutable values that the stages hand to one another.

Bytes, seconds and nats are named in the fields. Nothing here imports torch at run time.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

ModelKind = Literal["causal-lm", "masked-lm", "classifier", "encoder"]
LayerKind = Literal["linear", "conv1d", "embedding", "head"]

#: bytes of one element, by the safetensors name of its type
DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}


def digest(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of a plain value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor as it lies in a safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One weight matrix of the model, in forward order.

    `shape` is always (out_features, in_features) (embeddings: (vocabulary, width)), also for a
    Conv1D, whose tensor is `transposed` on disk. `dtype` is the storage type in the checkpoint.
    """

    name: str
    block: int | None
    role: str
    kind: LayerKind
    shape: tuple[int, int]
    dtype: str
    fused: str | None = None
    tied_to: str | None = None
    transposed: bool = False
    compressible: bool = True
    reason: str | None = None

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def weight_name(self) -> str:
        return f"{self.name}.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What one decision is about: a linear, or a fused group (q/k/v, gate/up) as a whole."""

    name: str
    block: int | None
    role: str
    layers: tuple[LayerSpec, ...]

    @property
    def numel(self) -> int:
        return sum(layer.numel for layer in self.layers)


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
        """A short name such as `w4g64`, `w4c` (per channel), `w3g64-asym`, `w16`."""
        if self.dense:
            return "w16"
        grid = f"w{self.bits}" + (f"g{self.group_size}" if self.group_size else "c")
        grid += "" if self.symmetric else "-asym"
        return grid + (f"-s{round(100 * self.sparsity)}" if self.sparsity else "")

    @classmethod
    def parse(cls, label: str) -> Candidate:
        """The inverse of `label`.

        Raises:
            ValueError: the text is no label.
        """
        if label == "w16":
            return cls(bits=16)
        match = re.fullmatch(r"w([2-8])(?:g(\d+)|c)(-asym)?(?:-s(\d+))?", label)
        if match is None:
            raise ValueError(f"{label!r} is no candidate label (such as w4g64, w4c, w16)")
        bits, group, asym, sparsity = match.groups()
        return cls(
            bits=int(bits),
            group_size=int(group or 0),
            symmetric=asym is None,
            sparsity=int(sparsity or 0) / 100,
            pattern="unstructured" if sparsity else "none",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityTable:
    """Scores of one metric: {unit name: {candidate: score}}, higher = worse if compressed.

    `per_unit` is the metric's own candidate-free number (1 - mean rho for cca, and so on) and
    `per_block` its sum or mean over a block. `details` says whatever a reader must know.
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
    """What each unit gets; output of any allocator, input of compress, editable by hand."""

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
        """Plain data for JSON; candidates become their labels."""
        data = {name: getattr(self, name) for name in self.__slots__}
        data["budget"] = asdict(self.budget)
        data["choices"] = {unit: choice.label for unit, choice in self.choices.items()}
        data["notes"] = list(self.notes)
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
        return cls(**fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeReport:
    """Whole-file bytes and the three averages of bits that a reader may mean."""

    file_bytes: int
    dense_file_bytes: int
    nominal_bits: float
    effective_bits: float
    file_bits: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerResult:
    """What compression did to one linear: plain numbers for reports and manifests.

    `group_size` is the one really used (0 = per channel). `weight_error` is |W - Q|^2 / |W|^2,
    `output_error` E|x(W - Q)|^2 / E|xW|^2 on the calibration inputs (None if not measured).
    """

    name: str
    candidate: Candidate
    group_size: int
    nbytes: int
    weight_error: float
    output_error: float | None
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CompressedLayer:
    """A linear on a symmetric integer grid.

    codes: int8 (out, in), in [-2^(bits-1), 2^(bits-1) - 1]; scale: storage dtype (out, groups),
    never 0. The weight is codes * scale, groups being consecutive runs of inputs.
    """

    spec: LayerSpec
    result: LayerResult
    codes: torch.Tensor
    scale: torch.Tensor

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (out, in), multiplied out in `dtype`."""
        out, groups = self.scale.shape
        codes_OGK = self.codes.to(dtype).view(out, groups, -1)
        return (codes_OGK * self.scale.to(dtype).unsqueeze(-1)).view(out, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRecord:
    """Which text calibrated: enough to rebuild it and to tell it from another.

    `source` is "wikitext", "pydoc", a path's name ...; `origin` where it was found.
    `fingerprint` is the sha256 of the token ids; `text_sha256` of the text they come from.
    """

    source: str
    origin: str
    samples: int
    seqlen: int
    tokens: int
    seed: int
    fingerprint: str
    text_sha256: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """One number of one task."""

    task: str
    version: int
    metric: str
    value: float
    unit: str
    higher_is_better: bool
    samples: int
    seconds: float
    stderr: float | None = None
    seqlen: int | None = None
    tokens: int | None = None
    data_source: str | None = None
    data_sha256: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A written, verified directory."""

    path: Path
    weight_bytes: int
    format: str
    manifest: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Work under way: `done` of `total` steps of `stage` (total None: not known)."""

    stage: str
    done: int
    total: int | None
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something a person must not miss; every one ends up in the report.

    kind: "fallback" (another way was taken), "skipped" (left dense), "warning", "info".
    """

    kind: Literal["fallback", "skipped", "warning", "info"]
    subject: str
    message: str


Event = Progress | Notice
Emit = Callable[[Event], None]
