"""Build the model card of an artifact: its README.md."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cptq.artifact.companions import MODULES
from cptq.artifact.content import Content
from cptq.artifact.formats.interface import Format
from cptq.types import CalibrationRecord, CompressedLayer, ModelKind, Plan

CARD = "README.md"
PIPELINES: Mapping[ModelKind, str] = {
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "classifier": "text-classification",
    "encoder": "feature-extraction",
}
_LICENCE_LINES = re.compile(r"^(?:license|license_name|license_link):.*$", re.MULTILINE)


def build_card(
    model: Content,
    form: Format,
    plan: Plan,
    calibration: CalibrationRecord,
    weight_bytes: int,
    *,
    tuned: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | None = None,
) -> str:
    """Build the card: base model, loading, compression, results; Markdown with front matter.

    `tuned` as in `draft.Record`. `report` is the data of report.json, where a run has one: then the
    card says what was done and lost in its words.
    """
    layers = list(model.compressed.values())
    licence = next((x.split(":", 1)[1].strip() for x in _read_licence(model.path / CARD)), "")
    return "\n".join(
        [
            *_build_front_matter(model, form),
            f"# {model.base_name}, compressed by cptq",
            "",
            f"Made from `{model.base_name}` ({model.parameters:,} weights, sha256 "
            f"`{model.fingerprint[:16]}`).",
            "",
            *_describe_report(report),
            *_describe_loading(model, form),
            "## Compression",
            "",
            *_describe_compression(layers, plan, calibration, weight_bytes),
            *_describe_tuning(tuned),
            *_describe_activations(model),
            "",
            "## Results",
            "",
            *_describe_results(model, layers, plan, weight_bytes),
            "",
            "`cptq.json` contains everything else: the plan, versions, errors per layer and the "
            "sha256 of every tensor. `cptq verify` checks a copy against it.",
            "",
            "## Licence",
            "",
            "The licence of the base model" + (f": {licence}." if licence else " applies."),
            "",
        ]
    )


def _build_front_matter(model: Content, form: Format) -> list[str]:
    lines = ["---", *([f"library_name: {form.library}"] if form.library else [])]
    lines.append(f"pipeline_tag: {_find_pipeline_tag(model)}")
    if model.hub_id is not None:
        lines += [f"base_model: {model.hub_id}", "base_model_relation: quantized"]
    lines += _read_licence(model.path / CARD)
    lines += ["tags:", "- cptq", *(f"- {tag}" for tag in _list_tags(model, form)), "---", ""]
    return lines


def _find_pipeline_tag(model: Content) -> str:
    """Return the Hub's name of the model's task."""
    if (model.path / MODULES).exists():
        return "sentence-similarity"
    return PIPELINES[model.kind]


def _read_licence(card: Path) -> list[str]:
    """Read the licence lines of the base model's card."""
    if not card.is_file():
        return []
    text = card.read_text(encoding="utf-8", errors="replace")
    parts = text.split("---", 2)
    return _LICENCE_LINES.findall(parts[1]) if text.startswith("---") and len(parts) == 3 else []


def _list_tags(model: Content, form: Format) -> Sequence[str]:
    return form.tags if model.compressed else ()


def _describe_loading(model: Content, form: Format) -> list[str]:
    lines = ["## Loading", "", *form.describe_loading(model)]
    if (model.path / MODULES).exists():
        lines += ['With sentence-transformers: `SentenceTransformer("PATH")`.', ""]
    return lines


def _describe_report(report: Mapping[str, Any] | None) -> list[str]:
    """Describe what a run did and what the model lost, as its report does."""
    if report is None:
        return []
    derived = report["derived"]
    rows = [row for row in derived["before_after"] if row["unit"] != "bytes"]
    lines = ["## What was done", "", *(f"- {text}" for text in derived["sentences"]), ""]
    if rows:
        lines += ["| measure | before | after | 95% interval | unit |", "|---|--:|--:|--:|---|"]
        lines += [_format_row(row) for row in rows]
        lines += ["", _explain_rows(report["quality"]), ""]
    return lines


def _format_row(row: Mapping[str, Any]) -> str:
    before = "" if row["before"] is None else f"{float(row['before']):.4g}"
    ends = row["interval"]
    within = "" if ends is None else " to ".join(f"{float(end):.3g}" for end in ends)
    within += " (of the difference)" if within and row["difference"] is not None else ""
    return f"| {row['what']} | {before} | {float(row['after']):.4g} | {within} | {row['unit']} |"


def _explain_rows(quality: Mapping[str, Any]) -> str:
    chose = ", which also chose between two plans" if quality["chose_plan"] else ""
    return (
        f"Measured on {quality['tokens']:,} tokens of {quality['source']} in "
        f"{quality['samples']:,} {quality['sample_name']}s that did not calibrate{chose}. "
        "`cptq eval` measures quality on tasks."
    )


def _describe_compression(
    layers: Sequence[CompressedLayer],
    plan: Plan,
    calibration: CalibrationRecord,
    weight_bytes: int,
) -> list[str]:
    bits = Counter(layer.result.candidate.bits for layer in layers)
    spread = ", ".join(f"{bits[b]} at {b} bits" for b in sorted(bits)) or "none"
    scores = f" from the scores of `{plan.metric}`" if plan.metric else ""
    return [
        f"- Target `{plan.budget.asked}`: {plan.budget.limit_text}; the weight files take "
        f"{weight_bytes:,} bytes.",
        f"- Compressed layers: {spread}; all other matrices are stored as in the base model.",
        f"- Bits were chosen by `{plan.allocator}`{scores}.",
        f"- Calibration: {calibration.source}, {calibration.samples} samples, "
        f"{calibration.tokens:,} tokens, seed {calibration.seed}.",
    ]


def _describe_tuning(tuned: Mapping[str, Any] | None) -> list[str]:
    if tuned is None:
        return []
    return [
        f"- Tuned on the calibration text in {tuned['steps']} steps of {tuned['tokens_per_step']} "
        f"tokens: the scales of the compressed layers and {len(tuned['dense_tensors'])} norms and "
        "biases, which therefore differ from the base model's. Divergence from it on held-out "
        f"text: {tuned['before']:.4g} before, {tuned['after']:.4g} after, {tuned['unit']}."
    ]


def _describe_activations(model: Content) -> list[str]:
    found = model.activations
    if found is None:
        return []
    return [
        f"- Activation sparsity `{found.label}`: rules fitted on {found.tokens:,} calibration "
        f"tokens, on which {found.mean:.1%} of the products of {len(found.reached)} linears are "
        "dropped. The environment variable `CPTQ_ACTIVATION_SPARSITY=off`, or `cptq.load(PATH, "
        "activation_sparsity=False)`, leaves it out."
    ]


def _describe_results(
    model: Content, layers: Sequence[CompressedLayer], plan: Plan, weight_bytes: int
) -> list[str]:
    """Describe size, errors and predicted loss; `cptq eval` measures quality on tasks."""
    share, bits = weight_bytes / (2 * model.parameters), 8 * weight_bytes / model.parameters
    lines = [
        f"- Weight files: {weight_bytes:,} bytes, {share:.1%} of the size with 16 bits per weight; "
        f"{bits:.2f} bits per weight over the whole file."
    ]
    errors = [x.result.output_error for x in layers if x.result.output_error is not None]
    if errors:
        mean = sum(errors) / len(errors)
        held_out = any(x.result.held_out for x in layers)
        text = "text that did not calibrate" if held_out else "the calibration text"
        lines.append(
            f"- Relative squared error of layer outputs on {text}: {mean:.2%} on average, "
            f"{max(errors):.2%} at most."
        )
    if plan.predicted_loss is not None:
        lines.append(f"- Predicted loss (sum of the units' scores): {plan.predicted_loss:.4g}.")
    return lines
