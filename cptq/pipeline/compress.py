"""`cptq compress`: plan, compress, write and verify, report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cptq.allocation.allocate import allocate, check_plan
from cptq.allocation.cost import CostModel
from cptq.allocation.targets import resolve_budget
from cptq.artifact.formats import FORMATS
from cptq.artifact.hub import check_push, push
from cptq.artifact.place import check_space
from cptq.artifact.verify import TOLERANCE, Verification
from cptq.artifact.writer import VerificationSample, check_output, write_artifact
from cptq.calibration.replay import forward
from cptq.calibration.tokens import Batch, Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.compression.blockwise import compress_model
from cptq.compression.embeddings import compress_embeddings, embedding_tensors
from cptq.config import CompressSettings, find_runtime
from cptq.errors import PlanError
from cptq.pipeline.dense import calibrate, candidates, load_dense
from cptq.pipeline.facts import summary
from cptq.pipeline.files import read_table, stage_files
from cptq.pipeline.recorder import Recorder
from cptq.report.render import FILES, report_files
from cptq.report.summary import CompressOutcome, Summary, VerificationFacts
from cptq.sensitivity.measure import measure
from cptq.types import (
    Artifact,
    Budget,
    Candidate,
    CompressedLayer,
    Emit,
    Notice,
    Plan,
    SensitivityTable,
)

#: tokens of the input on which a written artifact is compared with the model in memory
SAMPLE_TOKENS = 64
#: what a load in float32 may differ by from a run in a narrower type, as a share of the largest
#: output: a few units of bfloat16's last place
NARROW_TOLERANCE = 0.05
DEFAULT_TARGET = "4bit"


def compress(settings: CompressSettings, emit: Emit) -> CompressOutcome:
    """Plan, compress, write and verify an artifact."""
    run = _Run(settings=settings, recorder=Recorder(emit))
    with run.recorder.stage("plan"):
        budget = run.read_budget_or_plan()
    run.calibration = calibrate(run.model, settings, run.recorder)
    if run.plan is None:
        run.plan = run.make_plan(budget)
    with run.recorder.stage("compression"):
        layers = compress_embeddings(run.model, run.embedding, run.layout)
        layers += compress_model(
            run.model,
            run.calibration,
            run.plan,
            compressor=settings.compressor,
            half_scales=run.runtime.half_scales,
            layout=run.layout,
            emit=run.recorder,
        )
    artifact, report = run.write(layers, run.plan)
    if run.runtime.next_step is not None:
        message = f"to run it there: {run.runtime.next_step.format(out=run.out)}"
        emit(Notice(kind="info", subject=run.runtime.name, message=message))
    if settings.push_to_hub is not None:
        push(artifact.path, settings.push_to_hub, token=settings.model.token, emit=run.recorder)
    return CompressOutcome(
        summary=report,
        out=run.out,
        reports={kind: artifact.path / name for kind, name in FILES.items()},
        artifact=artifact,
    )


@dataclass(kw_only=True, eq=False)
class _Run:
    """What the steps of one compression hand on to each other."""

    settings: CompressSettings
    recorder: Recorder
    plan: Plan | None = None
    tables: dict[str, SensitivityTable] = field(default_factory=dict)
    calibration: Calibration = field(init=False)

    def __post_init__(self) -> None:
        settings, self.runtime = self.settings, find_runtime(self.settings.runtime)
        self.model: LoadedModel = load_dense(
            settings.model, self.recorder, conv1d=self.runtime.wider
        )
        if any(width < 16 for width in self.settings.bits):
            self.runtime.check_tensors(spec.name for spec in self.model.tensors)
        self.layout = FORMATS.get(self.runtime.format).layout
        symmetric = not settings.asymmetric
        self.choices = candidates(settings.bits, settings.group_size, symmetric=symmetric)
        self.embedding: Candidate | None = None
        if settings.embedding_bits is not None:
            self.embedding = Candidate(
                bits=settings.embedding_bits, group_size=settings.group_size, symmetric=symmetric
            )
        self.cost = CostModel(
            self.model.units,
            self.model.tensors,
            self.layout,
            self.runtime,
            embedding_tensors(self.model, self.embedding, self.layout, self.recorder),
        )

    def read_budget_or_plan(self) -> Budget:
        """The bytes to keep to; a target out of reach is refused before anything is measured."""
        settings = self.settings
        if settings.push_to_hub is not None:
            check_push(settings.push_to_hub, settings.model.token)
        if settings.plan is not None:
            self.plan = _given_plan(settings.plan, self.model, self.cost)
            budget = self.plan.budget
        else:
            target = settings.target or DEFAULT_TARGET
            budget = resolve_budget(target, self.cost, settings.group_size, self.choices)
        if settings.sensitivity is not None:
            self.read_table()
        self.out = settings.out or Path(f"{self.model.path.name}-cptq-{budget.asked}")
        place = check_output(self.out, overwrite=settings.overwrite, source=self.model.path)
        check_space(place, budget.limit_bytes)
        return budget

    def make_plan(self, budget: Budget) -> Plan:
        """Measure where the allocator needs it and no file of --sensitivity has it; allocate."""
        settings = self.settings
        if settings.sensitivity is None and settings.allocator != "uniform":
            self.measure()
        with self.recorder.stage("allocation"):
            return allocate(
                settings.allocator,
                next(iter(self.tables.values()), None),
                self.cost,
                budget,
                self.choices,
                model_fingerprint=self.model.fingerprint,
                emit=self.recorder,
            )

    def measure(self) -> None:
        """Fill `tables` with that of the metric asked for."""
        with self.recorder.stage("sensitivity"):
            self.tables = measure(
                self.model,
                self.calibration,
                metrics=[self.settings.metric],
                candidates=self.choices,
                seed=self.settings.calibration.seed,
                emit=self.recorder,
            )

    def read_table(self) -> None:
        """Fill `tables` from the file of --sensitivity."""
        assert self.settings.sensitivity is not None
        table = read_table(self.settings.sensitivity, self.model.fingerprint)
        self.tables = {table.metric: table}

    def write(self, layers: list[CompressedLayer], plan: Plan) -> tuple[Artifact, Summary]:
        """The artifact, and in it the report."""
        made: list[Summary] = []

        def reports(found: Verification | None) -> Mapping[str, bytes]:
            made.append(self.report(layers, plan, found))
            return report_files(made[0])

        with self.recorder.stage("artifact"):
            artifact = write_artifact(
                self.model,
                layers,
                plan,
                calibration=self.calibration.record,
                out=self.out,
                overwrite=self.settings.overwrite,
                seed=self.settings.calibration.seed,
                sample=_verification_sample(self.model, self.calibration, self.settings),
                extras=stage_files(self.model, self.calibration.record, self.tables, plan),
                reports=reports,
                form=self.runtime.format,
                emit=self.recorder,
            )
        return artifact, made[0]

    def report(
        self, layers: list[CompressedLayer], plan: Plan, found: Verification | None
    ) -> Summary:
        """Everything that is known when the files are written and verified."""
        return summary(
            "compress",
            self.settings,
            self.model,
            self.recorder,
            seed=self.settings.calibration.seed,
            candidates=self.choices,
            calibration=self.calibration.record,
            sensitivity=self.tables,
            budget=plan.budget,
            plan=plan,
            size=self.cost.size_report(plan.choices),
            results=tuple(layer.result for layer in layers),
            verification=_facts(found),
        )


def _given_plan(path: Path, model: LoadedModel, cost: CostModel) -> Plan:
    """The plan of `--plan`, checked against this model, its bytes counted anew."""
    try:
        plan = Plan.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"{path} holds no plan: {error}") from error
    check_plan(plan, cost, model.fingerprint)
    return replace(plan, predicted_bytes=cost.file_bytes(plan.choices))


@torch.no_grad()
def _verification_sample(
    model: LoadedModel, calibration: Calibration, settings: CompressSettings
) -> VerificationSample:
    """A short input and what the compressed model in memory makes of it."""
    batch: Batch = {name: x[:1, :SAMPLE_TOKENS] for name, x in calibration.batches[0].items()}
    exact = model.device.type == "cpu" and model.dtype == torch.float32
    return VerificationSample(
        inputs=batch,
        expected=_answer(forward(model, batch)),
        tolerance=TOLERANCE if exact else NARROW_TOLERANCE,
        trust_remote_code=settings.model.trust_remote_code,
    )


def _answer(output: Any) -> torch.Tensor:
    answer = output.logits if hasattr(output, "logits") else output.last_hidden_state
    assert isinstance(answer, torch.Tensor)
    return answer.float().cpu()


def _facts(found: Verification | None) -> VerificationFacts | None:
    if found is None:
        return None
    return VerificationFacts(
        missing=found.missing,
        unexpected=found.unexpected,
        mismatched=found.mismatched,
        max_abs_difference=found.max_abs_difference,
        seconds=found.seconds,
    )
