"""Results: sizes, compressed layers, calibration records, evaluation results, artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cptq.types.activations import ActivationRule
from cptq.types.model import LayerSpec
from cptq.types.plan import Candidate, Scope
from cptq.types.samples import PerSample, read_per_sample

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeReport:
    """Bytes of the whole file and of the compressible weights in it, and three averages of bits.

    `compressible_bytes` are those of the compressible weights as stored. `file` says which file is
    counted: that of the artifact, or the GGUF that is exported from it.
    """

    file_bytes: int
    compressible_bytes: int
    dense_file_bytes: int
    nominal_bits: float
    effective_bits: float
    file_bits: float
    file: str = "weight file"

    def count_bytes(self, scope: Scope) -> int:
        """Return the bytes that a budget of this scope limits."""
        return self.file_bytes if scope == "file" else self.compressible_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerResult:
    """Result of compressing one layer: plain numbers for reports and manifests.

    `group_size` is the size in use (0 = per channel). `weight_error` is |W - Q|^2 / |W|^2,
    `output_error` E|x(W - Q)|^2 / E|xW|^2 (None if not measured), on inputs from text that is
    `held_out`, or else on the calibration inputs, on which codes and scales were fitted, so that it
    is too small. Both are of the layer as it is stored: after --tune, where that changed it.
    """

    name: str
    candidate: Candidate
    group_size: int
    nbytes: int
    weight_error: float
    output_error: float | None
    seconds: float
    held_out: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CompressedLayer:
    """A weight on an integer grid.

    codes: int8 (out, in), in [-2^(bits-1), 2^(bits-1) - 1]; scale: storage dtype (out, groups),
    never 0. The weight is codes * scale, groups being consecutive runs of inputs; on an asymmetric
    grid (codes - zero) * scale with zero int8 (out, groups). Where there is a mask, bool (out, in),
    a weight that it leaves out is 0. `cptq.numerics.grid.dequantize_layer` multiplies it out.
    `rule`: which inputs are dropped at run time.
    """

    spec: LayerSpec
    result: LayerResult
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    rule: ActivationRule | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRecord:
    """The calibration text, identified well enough to rebuild it.

    `source` is "wikitext", "pydoc", the name of a path ...; `origin` its location. `fingerprint` is
    the sha256 of the token ids, `text_sha256` of the text. `sketch` is a digest of the text of the
    samples (`cptq.data.overlap`), which the leak check compares with evaluation data. `bos`: every
    window begins with the tokenizer's BOS. `documents`: windows are cut from documents "joined" or
    "apart" (None: no windows, or not recorded). `pairs`: samples are pairs of sentences.
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
    bos: bool = False
    documents: str | None = None
    pairs: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """One metric of one task, with what is needed to compare it between models.

    `version` is the task's: it increases when the same model on the same data gets another number.
    `samples` counts the independent units behind `stderr` (windows, sentences, questions; tokens
    for KL); `seqlen` and `tokens` apply to language modelling. `data_sha256` is of the text or the
    examples, `data_fingerprint` of the samples made from them (for windows of tokens computed as
    that of a calibration). Results with equal fingerprints can be compared sample by sample by
    their `per_sample`. `protocol` names how a text was cut into windows (None: no perplexity),
    `in_domain` says that the model was calibrated on the same corpus.
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
    protocol: str | None = None
    in_domain: bool = False
    notes: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvalResult:
        """Read a result of eval.json, ignoring unknown fields.

        Raises:
            KeyError, TypeError, ValueError: the data is invalid.
        """
        known = {item.name: data[item.name] for item in fields(cls) if item.name in data}
        known["value"] = float(data["value"])  # JSON holds "inf" and "nan" as texts
        known["per_sample"] = read_per_sample(data.get("per_sample"))
        known["notes"] = tuple(data.get("notes", ()))
        return cls(**known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A written directory and its manifest."""

    path: Path
    weight_bytes: int
    format: str
    manifest: Mapping[str, Any]
