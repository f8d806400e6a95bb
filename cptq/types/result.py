"""What came out: sizes, compressed layers, calibration, evaluation, the artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cptq.types.model import LayerSpec
from cptq.types.plan import Candidate, Scope
from cptq.types.samples import PerSample, per_sample_from

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeReport:
    """Bytes of the whole file and of the compressible weights in it, and three averages of bits.

    `compressible_bytes` are those of the compressible weights as stored.
    """

    file_bytes: int
    compressible_bytes: int
    dense_file_bytes: int
    nominal_bits: float
    effective_bits: float
    file_bits: float

    def count_bytes(self, scope: Scope) -> int:
        """Return the bytes that a budget of this scope limits."""
        return self.file_bytes if scope == "file" else self.compressible_bytes


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
    """A weight on an integer grid.

    codes: int8 (out, in), in [-2^(bits-1), 2^(bits-1) - 1]; scale: storage dtype (out, groups),
    never 0. The weight is codes * scale, groups being consecutive runs of inputs; on an asymmetric
    grid (codes - zero) * scale with zero int8 (out, groups). Where there is a mask, bool (out, in),
    a weight that it leaves out is 0.
    """

    spec: LayerSpec
    result: LayerResult
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (out, in), multiplied out in `dtype`.

        An expert's is multiplied out in the type of its scales, as stock transformers does before
        it stacks the experts.
        """
        if self.spec.expert:
            return self._multiplied(self.scale.dtype).to(dtype)
        return self._multiplied(dtype)

    def _multiplied(self, dtype: torch.dtype) -> torch.Tensor:
        out, groups = self.scale.shape
        codes_OGK = self.codes.to(dtype).view(out, groups, -1)
        if self.zero is not None:
            codes_OGK = codes_OGK - self.zero.to(dtype).unsqueeze(-1)
        weight_OI = (codes_OGK * self.scale.to(dtype).unsqueeze(-1)).view(out, -1)
        return weight_OI if self.mask is None else weight_OI.masked_fill_(~self.mask, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRecord:
    """Which text calibrated: enough to rebuild it and to tell it from another.

    `source` is "wikitext", "pydoc", a path's name ...; `origin` where it was found.
    `fingerprint` is the sha256 of the token ids; `text_sha256` of the text they come from.
    `sketch` stands for the samples' own text (`cptq.data.overlap`), so that an evaluation on the
    same text is noticed.
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
    sketch: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """One number of one task, with all that comparing it with another model's takes.

    `version` is that of the task: it grows when the same model on the same data gets another
    number. `samples` are the independent units that `stderr` counts (windows, sentences,
    questions; tokens for KL), `seqlen` and `tokens` those of language modelling. `data_sha256` is
    of the text or the examples; `data_fingerprint` of what the samples are, made as a calibration's
    is for windows of tokens: results that have the same one can be compared sample by sample by
    their `per_sample`.
    """

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
    data_fingerprint: str | None = None
    per_sample: PerSample | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvalResult:
        """A result as eval.json holds it; fields that this version does not know are left out.

        Raises:
            KeyError, TypeError, ValueError: it holds none.
        """
        known = {item.name: data[item.name] for item in fields(cls) if item.name in data}
        known["value"] = float(data["value"])  # "inf" and "nan" are texts in JSON
        known["per_sample"] = per_sample_from(data.get("per_sample"))
        known["notes"] = tuple(data.get("notes", ()))
        return cls(**known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A written, verified directory."""

    path: Path
    weight_bytes: int
    format: str
    manifest: Mapping[str, Any]
