"""`cptq compress`: plan, compress, write and verify, report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cptq.artifact.hub import push
from cptq.artifact.verify import TOLERANCE, Verification
from cptq.artifact.writer import VerificationSample, write_artifact
from cptq.calibration.replay import forward
from cptq.calibration.tokens import Batch, Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.compression.blockwise import compress_model
from cptq.compression.embeddings import compress_embeddings
from cptq.config import CompressSettings
from cptq.pipeline.duel import ship_the_better
from cptq.pipeline.facts import summary, verification_facts
from cptq.pipeline.files import stage_files
from cptq.pipeline.planning import Planning
from cptq.pipeline.recorder import Recorder
from cptq.report.render import FILES, report_files
from cptq.report.summary import CompressOutcome, Summary
from cptq.types import (
    Artifact,
    CompressedLayer,
    Emit,
    Notice,
    Plan,
)

#: tokens of the input on which a written artifact is compared with the model in memory
SAMPLE_TOKENS = 64
#: what a load in float32 may differ by from a run in a narrower type, as a share of the largest
#: output: a few units of bfloat16's last place
NARROW_TOLERANCE = 0.05


def compress(settings: CompressSettings, emit: Emit) -> CompressOutcome:
    """Plan, compress, write and verify an artifact."""
    run = _Run(settings=settings, recorder=Recorder(emit))
    with run.recorder.stage("plan"):
        run.read_target_or_plan()
    run.prepare_text()
    if run.plan is None:
        run.plan = run.refined(run.make_plan())
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


class _Run(Planning):
    """The steps from a plan to a written artifact."""

    def carry_out(self, plan: Plan) -> tuple[Plan, list[CompressedLayer]]:
        """Compress; beside a plan that asks no score where --check-uniform wants it."""
        with self.recorder.stage("compression"):
            rest = compress_embeddings(self.model, self.embedding, self.layout, self.runtime)
            rival = self.rival(plan)
            if rival is None:
                return plan, rest + self.compress(plan, self.recorder)
            plan, layers = ship_the_better(
                self.model, plan, rival, self.compress, self.judging[-1], self.recorder
            )
            return plan, rest + layers

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
                form=self.form,
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
