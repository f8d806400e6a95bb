"""`cptq analyze`: measure and report."""

from __future__ import annotations

from pathlib import Path

from cptq.artifact.place import check_output, new_directory
from cptq.artifact.weights import write_files
from cptq.config import AnalyzeSettings
from cptq.pipeline.dense import calibrate, candidates, load_dense
from cptq.pipeline.facts import summary
from cptq.pipeline.files import stage_files
from cptq.pipeline.recorder import Recorder
from cptq.pipeline.validate import validate
from cptq.report.render import FILES, report_files
from cptq.report.summary import AnalyzeOutcome
from cptq.sensitivity.measure import measure
from cptq.types import Emit


def analyze(settings: AnalyzeSettings, emit: Emit) -> AnalyzeOutcome:
    """Measure how much each unit may be squeezed, and report it."""
    recorder = Recorder(emit)
    model = load_dense(settings.model, recorder)
    out = settings.out or Path(f"{model.path.name}-analysis")
    place = check_output(out, overwrite=settings.overwrite, source=model.path, marker=FILES["json"])
    calibration = calibrate(model, settings, recorder, judging=int(settings.validate))
    choices = candidates(settings.bits, settings.group_size)
    with recorder.stage("sensitivity"):
        tables = measure(
            model,
            calibration,
            metrics=settings.metrics,
            candidates=choices,
            seed=settings.calibration.seed,
            emit=recorder,
        )
    validation = None
    if settings.validate:
        with recorder.stage("validation"):
            validation = validate(model, calibration, tables, choices, settings, recorder)
    report = summary(
        "analyze",
        settings,
        model,
        recorder,
        seed=settings.calibration.seed,
        candidates=choices,
        calibration=calibration.record,
        sensitivity=tables,
        validation=validation,
    )
    files = stage_files(model, calibration.record, tables, None, validation) | report_files(report)
    with new_directory(place, sum(map(len, files.values()))) as draft:
        write_files(draft, files)
    return AnalyzeOutcome(
        summary=report, out=out, reports={kind: out / name for kind, name in FILES.items()}
    )
