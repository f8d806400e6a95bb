"""`cptq verify`."""

from __future__ import annotations

from cptq.cli import options as o
from cptq.cli.tool import Answer, answer
from cptq.types import Emit


def verify(
    artifact: o.Artifact,
    trust_remote_code: o.TrustRemoteCode = None,
    shape: o.Shape = "human",
) -> None:
    """Check that an artifact is what was written.

    Digests of files and tensors; then a fresh process loads it, and the outputs for the sample in
    cptq.json must be those of the model that was compressed.
    """

    def work(emit: Emit) -> Answer:
        from cptq.artifact.verify import verify_artifact
        from cptq.report.formatting import tabulate_pairs

        found = verify_artifact(artifact, emit, trust_remote_code=bool(trust_remote_code))
        reload = found.reload
        difference = None if reload is None else reload.max_abs_difference
        rows = [
            ("format", found.form),
            ("files", f"{found.files:,} as written"),
            ("tensors", f"{found.tensors:,} as written (sha256)"),
            ("keys", None if reload is None else "none missing, unexpected or mismatched"),
            ("largest difference", "not compared" if difference is None else f"{difference:.3g}"),
        ]
        document = {
            "command": "verify",
            "path": str(found.path),
            "format": found.form,
            "files": found.files,
            "tensors": found.tensors,
            "max_abs_difference": difference,
        }
        return Answer(
            tables=[tabulate_pairs(f"{found.path} is what was written", rows)],
            document=document,
            line=str(found.path),
        )

    answer(shape, work)
