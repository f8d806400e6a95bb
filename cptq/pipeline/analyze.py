"""`cptq analyze`: measure and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cptq.allocation.ledger import Ledger
from cptq.artifact.place import check_output, new_directory
from cptq.artifact.weights import write_files
from cptq.calibration.tokens import Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.config import RUNTIMES, AnalyzeSettings, find_runtime
from cptq.errors import UsageError
from cptq.pipeline.dense import asked_for, calibrate, load_dense
from cptq.pipeline.facts import summary
from cptq.pipeline.files import read_tables, stage_files
from cptq.pipeline.recorder import Recorder
from cptq.pipeline.validate import build_ledgers, validate
from cptq.report.render import FILES, report_files
from cptq.report.summary import AnalyzeOutcome, Summary
from cptq.sensitivity import SLOW, everyday
from cptq.sensitivity.measure import measure, needs_text
from cptq.sensitivity.partial import InterruptedMeasurementError
from cptq.types import Candidate, Emit, Notice, SensitivityTable, Validation


def analyze(settings: AnalyzeSettings, emit: Emit) -> AnalyzeOutcome:
    """Measure how much each unit may be squeezed, and report it.

    Raises:
        KeyboardInterrupt: Ctrl-C; its text says where the units that were measured lie, if any.
    """
    recorder = Recorder(emit)
    model = load_dense(settings.model, recorder, conv1d=True)
    _name_what_stays_dense(model, settings, recorder)
    out = settings.out or Path(f"{model.path.name}-analysis")
    place = check_output(out, overwrite=settings.overwrite, source=model.path, marker=FILES["json"])
    choices = asked_for(settings)
    # before the work, so that a target out of reach is refused at once
    ledgers = build_ledgers(model, choices, settings) if settings.validate else []
    known = read_tables(
        settings.sensitivity, model.fingerprint, {unit.name: choices for unit in model.units}
    )
    wanted = tuple(name for name in settings.metrics if name not in known)
    text = settings.validate or (bool(wanted) and needs_text(wanted))
    judging = int(settings.validate)
    calibration = calibrate(model, settings, recorder, judging=judging) if text else None
    run = _Run(settings, model, calibration, choices, ledgers, recorder)
    _name_what_all_leaves_out(settings.metrics, recorder)
    try:
        tables = known | run.measure(wanted)
    except InterruptedMeasurementError as stop:
        raise run.keep(stop, place, out) from stop
    return AnalyzeOutcome(
        summary=run.write(tables, place, run.validate(tables)),
        out=out,
        reports={kind: out / name for kind, name in FILES.items()},
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """What a report is made from beside the tables."""

    settings: AnalyzeSettings
    model: LoadedModel
    calibration: Calibration | None
    choices: tuple[Candidate, ...]
    ledgers: Sequence[Ledger]
    recorder: Recorder

    def measure(self, metrics: Sequence[str]) -> dict[str, SensitivityTable]:
        """The tables of metrics that no earlier analysis has."""
        if not metrics:
            return {}
        with self.recorder.stage("sensitivity"):
            return measure(
                self.model,
                self.calibration,
                metrics=metrics,
                candidates=self.choices,
                seed=self.settings.calibration.seed,
                emit=self.recorder,
            )

    def validate(self, tables: Mapping[str, SensitivityTable]) -> Validation | None:
        """What the tables are worth, where that is asked for."""
        if not self.settings.validate or self.calibration is None:
            return None
        with self.recorder.stage("validation"):
            return validate(
                self.model,
                self.calibration,
                tables,
                self.choices,
                self.ledgers,
                self.settings,
                self.recorder,
            )

    def write(
        self,
        tables: Mapping[str, SensitivityTable],
        place: Path,
        validation: Validation | None = None,
    ) -> Summary:
        """All files of an analysis, whole or not at all; the report that is among them."""
        record = self.calibration.record if self.calibration else None
        report = summary(
            "analyze",
            self.settings,
            self.model,
            self.recorder,
            seed=self.settings.calibration.seed,
            candidates=self.choices,
            calibration=record,
            sensitivity=tables,
            validation=validation,
        )
        files = stage_files(self.model, record, tables, None, validation) | report_files(report)
        with new_directory(place, sum(map(len, files.values()))) as draft:
            write_files(draft, files)
        return report

    def keep(self, stop: InterruptedMeasurementError, place: Path, out: Path) -> KeyboardInterrupt:
        """Write what an interrupted measurement has; the interrupt that says so."""
        what = f"{stop.done} of {stop.total} units were measured"
        message = f"interrupted: {what}; these tables are for reading, no plan is made from them"
        self.recorder(Notice(kind="warning", subject="sensitivity", message=message))
        self.write(stop.tables, place)
        return KeyboardInterrupt(f"interrupted; {what} and are kept in {out}")


def _name_what_stays_dense(model: LoadedModel, settings: AnalyzeSettings, emit: Emit) -> None:
    """A word on Conv1D layers, which are measured for whatever runtime and taken by few.

    Raises:
        UsageError: plans are to be compared, and the runtime compresses none of the layers.
    """
    runtime = find_runtime(settings.runtime)
    taken = [u.name for u in model.units if not any(layer.transposed for layer in u.layers)]
    if runtime.conv1d or len(taken) == len(model.units):
        return
    wider = " or ".join(name for name, known in RUNTIMES.items() if known.conv1d)
    if settings.validate and not taken:
        raise UsageError(
            f"--runtime {runtime.name} keeps every layer of this model dense (they are Conv1D), so "
            "there are no plans to compare",
            hint=f"add --runtime {wider}",
        )
    count = len(model.units) - len(taken)
    message = f"{count} Conv1D layers are measured, and stay dense except with --runtime {wider}"
    emit(Notice(kind="info", subject=f"--runtime {runtime.name}", message=message))


def _name_what_all_leaves_out(metrics: tuple[str, ...], emit: Emit) -> None:
    """`all` stands for the everyday metrics: name the others once where all of those are there."""
    left_out = [name for name in SLOW if name not in metrics]
    if left_out and set(everyday()) <= set(metrics):
        names = " ".join(f"--metric {name}" for name in left_out)
        message = (
            f"without {', '.join(left_out)}, which runs half the model on the held-out text for "
            f"every unit and width; add it with {names}"
        )
        emit(Notice(kind="info", subject="--metric all", message=message))
