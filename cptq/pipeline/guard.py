"""What `cptq compress` lost, on text that did not calibrate: measured by default, `--no-eval` not.

The held-out text of `HeldOutText.judge` runs through the model while it is dense, and again once it
computes with what was compressed. The first pass is shared with `--check-uniform` and `--tune`. It
changes no weight, and nothing of it is in the manifest: it is a part of the report.
"""

from __future__ import annotations

from functools import cached_property

from cptq.calibration.depth import DepthError
from cptq.calibration.divergence_from_dense import DivergenceFromDense
from cptq.calibration.guard import measure_guard
from cptq.calibration.objective import choose_objective
from cptq.pipeline.inputs import CompressInputs
from cptq.pipeline.recorder import Recorder
from cptq.pipeline.run_directory import RunDirectory
from cptq.types import GuardQuality, Notice

#: the step of the measures
GUARD_STEP = "quality"
STAGE = "quality"


class Guard:
    """The held-out text of a run, and what the dense model makes of it."""

    def __init__(self, inputs: CompressInputs) -> None:
        self._inputs = inputs

    @cached_property
    def divergence(self) -> DivergenceFromDense:
        """The divergence from the dense model; first read while the model is dense."""
        model = self._inputs.model
        objective = choose_objective(model.kind, model.config)
        return DivergenceFromDense(model, self._inputs.held_out.judge, objective, units=False)

    @property
    def recorded(self) -> DivergenceFromDense | None:
        """`divergence`; None where nothing has asked for it so far."""
        found: DivergenceFromDense | None = self.__dict__.get("divergence")
        return found

    @property
    def judge(self) -> DivergenceFromDense | None:
        """`divergence`; None where no text is held out for it."""
        return self.divergence if self._inputs.held_out.judge else None

    @cached_property
    def depth(self) -> DepthError:
        """The hidden states of the dense model; first read while the model is dense."""
        return DepthError(self._inputs.model, self._inputs.held_out.judge)

    def record_dense(self, run: RunDirectory, recorder: Recorder) -> None:
        """Run the text through the dense model where `measure` will need it."""
        if not self._inputs.settings.evaluate or GUARD_STEP in run:
            return
        if self._inputs.held_out.judge:
            with recorder.stage(STAGE):
                self.divergence, self.depth  # noqa: B018

    def measure(
        self, run: RunDirectory, recorder: Recorder, *, chose_plan: bool
    ) -> GuardQuality | None:
        """Return what the model as it is now lost; None where it is not measured.

        `chose_plan`: the text decided which of two plans is carried out.
        """
        if not self._inputs.settings.evaluate:
            return None
        if not self._inputs.held_out.judge:
            message = (
                "no text is left beside what calibrates: what the model lost is not measured; "
                "fewer --samples or a longer text would leave some"
            )
            recorder(Notice(kind="skipped", subject="--eval", message=message))
            return None
        source = self._inputs.calibration.record.source

        def make() -> GuardQuality:
            return measure_guard(self.divergence, self.depth, source=source, chose_plan=chose_plan)

        with recorder.stage(STAGE):
            found: GuardQuality = run.keep(GUARD_STEP, make)
        return found
