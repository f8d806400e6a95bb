"""Immutable values that the stages pass to one another.

Field names give the units: bytes, seconds, nats. Nothing here imports torch at run time.
"""

from __future__ import annotations

from cptq.types.activations import ActivationRecord, ActivationRule
from cptq.types.comparison import (
    ComparedResult,
    Comparison,
    PairedDifference,
    join_results,
)
from cptq.types.event import Emit, Event, Fragment, Notice, Progress
from cptq.types.explanation import Explanation, Step
from cptq.types.guard import GuardMeasure, GuardQuality
from cptq.types.keep import Keep, keep_nothing
from cptq.types.model import (
    DTYPE_BYTES,
    LayerKind,
    LayerSpec,
    ModelKind,
    TensorSpec,
    Unit,
    choose_16bit_dtype,
    count_end_blocks,
    is_expert,
)
from cptq.types.plan import (
    SUPER_SCALES,
    Budget,
    Candidate,
    Plan,
    Scope,
    SensitivityTable,
    compute_share,
    digest,
)
from cptq.types.prospect import Prospect, ProspectPart
from cptq.types.result import (
    Artifact,
    CalibrationRecord,
    CompressedLayer,
    EvalResult,
    LayerResult,
    SizeReport,
)
from cptq.types.samples import PerSample, SamplePairs, SampleRatios
from cptq.types.speed import Figure, ModelSpeed, SpeedReport
from cptq.types.validation import Agreement, Interval, Pair, PlanTrial, Validation

__all__ = [
    "DTYPE_BYTES",
    "SUPER_SCALES",
    "ActivationRecord",
    "ActivationRule",
    "Agreement",
    "Artifact",
    "Budget",
    "CalibrationRecord",
    "Candidate",
    "ComparedResult",
    "Comparison",
    "CompressedLayer",
    "Emit",
    "EvalResult",
    "Event",
    "Explanation",
    "Figure",
    "Fragment",
    "GuardMeasure",
    "GuardQuality",
    "Interval",
    "Keep",
    "LayerKind",
    "LayerResult",
    "LayerSpec",
    "ModelKind",
    "ModelSpeed",
    "Notice",
    "Pair",
    "PairedDifference",
    "PerSample",
    "Plan",
    "PlanTrial",
    "Progress",
    "Prospect",
    "ProspectPart",
    "SamplePairs",
    "SampleRatios",
    "Scope",
    "SensitivityTable",
    "SizeReport",
    "SpeedReport",
    "Step",
    "TensorSpec",
    "Unit",
    "Validation",
    "choose_16bit_dtype",
    "compute_share",
    "count_end_blocks",
    "digest",
    "is_expert",
    "join_results",
    "keep_nothing",
]
