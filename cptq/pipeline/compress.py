"""`cptq compress`: plan, compress, write and verify, report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cptq.allocation import BLIND
from cptq.allocation.allocate import allocate
from cptq.allocation.cost import CostModel
from cptq.allocation.limits import allowed, parse_limits
from cptq.allocation.targets import resolve_budget
from cptq.artifact.formats import FORMATS
from cptq.artifact.hub import check_push, push
from cptq.artifact.place import check_space
from cptq.artifact.verify import TOLERANCE, Verification
from cptq.artifact.writer import VerificationSample, check_output, write_artifact
from cptq.calibration.judges import parts
from cptq.calibration.replay import forward
from cptq.calibration.slices import Rows
from cptq.calibration.tokens import Batch, Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.compression.blockwise import compress_model
from cptq.compression.embeddings import compress_embeddings, embedding_tensors
from cptq.config import CompressSettings, find_runtime
from cptq.pipeline.dense import calibrate, candidates, load_dense
from cptq.pipeline.duel import ship_the_better
from cptq.pipeline.facts import summary, verification_facts
from cptq.pipeline.files import check_covers, read_plan, read_table, stage_files
from cptq.pipeline.recorder import Recorder
from cptq.pipeline.refine import refine_plan
from cptq.report.render import FILES, report_files
from cptq.report.summary import CompressOutcome, Summary
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
#: fewest spare rows on which a mixed plan is compared with the uniform one
LEAST_JUDGES = 4


def compress(settings: CompressSettings, emit: Emit) -> CompressOutcome:
    """Plan, compress, write and verify an artifact."""
    run = _Run(settings=settings, recorder=Recorder(emit))
    with run.recorder.stage("plan"):
        budget = run.read_budget_or_plan()
    run.prepare_text()
    if run.plan is None:
        run.plan = run.refined(run.make_plan(budget))
    plan, layers = run.carry_out(run.plan)
    artifact, report = run.write(layers, plan)
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
    judging: list[list[Rows]] = field(default_factory=list)
    checking: bool = False

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
        self.options: dict[str, tuple[Candidate, ...]] = self.allowed()

    def allowed(self) -> dict[str, tuple[Candidate, ...]]:
        """The candidates of each unit, by --pin, --min-bits and --max-bits."""
        settings, model = self.settings, self.model
        limits = parse_limits(settings.pins, settings.min_bits, settings.max_bits)
        options = allowed(
            limits,
            model.units,
            self.choices,
            group_size=settings.group_size,
            layers=model.layers,
            emit=self.recorder,
        )
        if limits.pins:
            self.cost.check_pinned(options)
        return options

    def read_budget_or_plan(self) -> Budget:
        """The bytes to keep to; a target out of reach is refused before anything is measured."""
        settings = self.settings
        if settings.push_to_hub is not None:
            check_push(settings.push_to_hub, settings.model.token)
        if settings.plan is not None:
            self.plan = read_plan(settings.plan, self.model, self.cost)
            budget = self.plan.budget
        else:
            target = settings.target or DEFAULT_TARGET
            budget = resolve_budget(target, self.cost, settings.group_size, self.options)
        if settings.sensitivity is not None:
            self.read_table()
        self.out = settings.out or Path(f"{self.model.path.name}-cptq-{budget.asked}")
        place = check_output(self.out, overwrite=settings.overwrite, source=self.model.path)
        check_space(place, budget.limit_bytes)
        return budget

    def prepare_text(self) -> None:
        """Calibrate; keep text apart for the search (two parts) and for the check (one)."""
        blind = self.settings.allocator in BLIND
        self.checking = self.settings.check_uniform and self.plan is None and not blind
        wanted = (2 if self.settings.refine else 0) + int(self.checking)
        self.calibration = calibrate(
            self.model, self.settings, self.recorder, judging=wanted, reserve=False
        )
        if wanted and (self.settings.refine or len(self.calibration.spare) >= LEAST_JUDGES):
            self.judging = parts(self.model, self.calibration.spare, wanted)

    def make_plan(self, budget: Budget) -> Plan:
        """Measure where the allocator needs it and no file of --sensitivity has it; allocate."""
        settings = self.settings
        if settings.sensitivity is None and settings.allocator not in BLIND:
            self.measure()
        with self.recorder.stage("allocation"):
            return self.allocate(settings.allocator, self.table, budget, self.recorder)

    @property
    def table(self) -> SensitivityTable | None:
        """The scores that decide, if any were asked for."""
        return next(iter(self.tables.values()), None)

    def allocate(
        self, name: str, table: SensitivityTable | None, budget: Budget, emit: Emit
    ) -> Plan:
        """A plan by the allocator `name`."""
        return allocate(
            name,
            table,
            self.cost,
            budget,
            self.choices,
            model_fingerprint=self.model.fingerprint,
            emit=emit,
            options=self.options,
        )

    def refined(self, plan: Plan) -> Plan:
        """The plan after --refine."""
        if not self.settings.refine:
            return plan
        with self.recorder.stage("refinement"):
            return refine_plan(
                self.model,
                self.calibration,
                self.judging[:2],
                plan,
                self.table,
                self.cost,
                self.options,
                self.settings,
                self.recorder,
            )

    def carry_out(self, plan: Plan) -> tuple[Plan, list[CompressedLayer]]:
        """Compress; beside a plan that asks no score where --check-uniform wants it."""
        with self.recorder.stage("compression"):
            rest = compress_embeddings(self.model, self.embedding, self.layout)
            rival = self.rival(plan)
            if rival is None:
                return plan, rest + self.compress(plan, self.recorder)
            plan, layers = ship_the_better(
                self.model, plan, rival, self.compress, self.judging[-1], self.recorder
            )
            return plan, rest + layers

    def rival(self, plan: Plan) -> Plan | None:
        """The plan to beat; None where none is needed, or no text is left to judge on."""
        if not self.checking:
            return None
        rival = self.allocate("even", None, plan.budget, lambda _: None)
        if rival.choices == plan.choices:
            return None
        if not self.judging:
            message = (
                "no text is left beside what calibrates: the plan is not compared with a uniform "
                "one; fewer --samples or a longer text would leave some"
            )
            self.recorder(Notice(kind="warning", subject="--check-uniform", message=message))
            return None
        return rival

    def compress(self, plan: Plan, emit: Emit) -> list[CompressedLayer]:
        """Carry a plan out on the dense model."""
        return compress_model(
            self.model,
            self.calibration,
            plan,
            compressor=self.settings.compressor,
            half_scales=self.runtime.half_scales,
            layout=self.layout,
            emit=emit,
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
        check_covers(table, self.settings.sensitivity, self.options)
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
            verification=verification_facts(found),
        )


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
