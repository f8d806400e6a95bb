"""Every format with every architecture: what is written is what its own loader computes.

Runs over the registries: a new format or family joins by itself. `pytest -s` prints the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from cptq.allocation.cost import CostModel
from cptq.artifact.content import build_content
from cptq.artifact.formats import FORMATS
from cptq.artifact.formats.interface import Format, SafetensorsFormat
from cptq.artifact.gguf.families import FAMILIES
from cptq.checkpoint.loader import AUTO_CLASSES
from cptq.checkpoint.model import LoadedModel
from cptq.config import RUNTIMES
from cptq.errors import ArtifactError
from cptq.types import CompressedLayer
from tests.conftest import TinyModel
from tests.tiny_models import RECIPES, VARIED
from tests.unit.artifact.builders import candidate, compress_layer, load, sample_of

pytestmark = pytest.mark.usefixtures("same_process")

WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)
#: sizes that 32 divides, so that every format can hold the layers; by each family's own names
_USUAL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
_LLAMA = _USUAL | {"num_key_value_heads": 2, "head_dim": 16}
_EXPERTS = {"num_experts": 6, "moe_intermediate_size": 64}
SIZES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA | _EXPERTS,
    "qwen2_moe": _LLAMA | _EXPERTS | {"shared_expert_intermediate_size": 64},
    "olmoe": _LLAMA | {"num_experts": 6, "intermediate_size": 64},
    "qwen2": _USUAL | {"num_key_value_heads": 2},
    "opt": {"hidden_size": 64, "ffn_dim": 96, "num_attention_heads": 4, "word_embed_proj_dim": 64},
    "gpt2": {"n_embd": 64, "n_inner": 96, "n_head": 4},
    "distilbert": {"dim": 64, "hidden_dim": 96, "n_heads": 4},
}
PAIRS = [(form, arch) for form in FORMATS for arch in RECIPES]
#: of these the quick tests take every format, and one architecture of each build
QUICK_FORMS: dict[str, tuple[str, ...]] = {
    arch: FORMATS
    if arch == "llama"
    else ("packed",)
    if arch in (*VARIED, "bert", "generic")
    else ()
    for arch in RECIPES
}
QUICK = [
    pytest.param(form, arch, marks=() if form in QUICK_FORMS[arch] else pytest.mark.slow)
    for form, arch in PAIRS
]


@pytest.fixture(scope="module")
def table() -> Iterator[dict[tuple[str, str, str], str]]:
    """{(architecture, format, bits): difference}, printed at the end."""
    rows: dict[tuple[str, str, str], str] = {}
    yield rows
    print("\n| model | bits | " + " | ".join(FORMATS) + " |")
    for arch, bits in dict.fromkeys((arch, bits) for arch, _, bits in rows):
        cells = (rows.get((arch, form, bits), "") for form in FORMATS)
        print(f"| {arch} | {bits} | " + " | ".join(cells) + " |")


def compressed(
    model: LoadedModel, form: Format, widths: tuple[int, ...], group: int = 32
) -> list[CompressedLayer]:
    """Unit after unit gets the next width, and turn by turn an asymmetric grid where the format has
    one of that width; what the format refuses stays dense."""
    cost = CostModel(model.units, model.tensors, form.layout, RUNTIMES["cptq"])
    each, layers = cycle(widths), []
    for number, unit in enumerate(model.units):
        choice = candidate(next(each), group)
        asymmetric = replace(choice, symmetric=choice.dense)
        if number % 2 and cost.explain_refusal(unit.name, asymmetric) is None:
            choice = asymmetric
        if any(spec.expert for spec in unit.layers):  # they have one scheme, or none
            choice = candidate(next(width for width in widths if width < 16), group)
        if not choice.dense and cost.explain_refusal(unit.name, choice) is None:
            layers += [compress_layer(model, spec, choice) for spec in unit.layers]
    return layers


def difference(
    form: Format, path: Path, widths: tuple[int, ...], out: Path
) -> tuple[float | None, float, int]:
    """Largest difference of the outputs, their largest value, and how many layers were packed."""
    model = load(path, conv1d=True, experts=True)
    layers = compressed(model, form, widths)
    content = build_content(model, layers, lambda event: None)
    form.check(content)
    out.mkdir()
    sample = sample_of(model)
    files = form.write(content, out, lambda event: None)
    assert sum(files.values()) <= form.estimate_bytes(content)
    found = form.check_reload(out, model.kind, sample, lambda event: None, path)
    return found.max_abs_difference, float(sample.expected.abs().max()), len(layers)


def expected_refusal(form: Format, arch: str) -> bool:
    """GGUF is for the families, and the kinds of model, that llama.cpp computes."""
    kind = next(k for k, name in AUTO_CLASSES.items() if name == RECIPES[arch].auto.__name__)
    return form.name == "gguf" and (RECIPES[arch].model_type, kind) not in FAMILIES


def check_pair(
    name: str,
    arch: str,
    widths: tuple[int, ...],
    tiny_model: TinyModel,
    out: Path,
    table: dict[tuple[str, str, str], str],
) -> None:
    form: Format = FORMATS.get(name)
    path = tiny_model(arch, dtype=torch.float16, **SIZES.get(arch, _USUAL))
    key = (arch, name, ",".join(map(str, widths)))
    if expected_refusal(form, arch):
        with pytest.raises(ArtifactError, match="GGUF"):
            difference(form, path, widths, out)
        table[key] = "refused"
        return
    found, largest, packed = difference(form, path, widths, out)
    conv1d = arch == "gpt2" and name == "compressed-tensors"
    assert packed or conv1d or widths == (16, 16)
    table[key] = "not run" if found is None else f"{found / largest:.2g}"
    if isinstance(form, SafetensorsFormat):
        assert found == 0.0


@pytest.mark.parametrize(("form", "arch"), QUICK)
def test_every_format_with_every_architecture(
    form: str,
    arch: str,
    tiny_model: TinyModel,
    tmp_path: Path,
    table: dict[tuple[str, str, str], str],
) -> None:
    check_pair(form, arch, WIDTHS, tiny_model, tmp_path / "out", table)


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("form", "arch"), PAIRS)
def test_every_width_too(
    form: str,
    arch: str,
    width: int,
    tiny_model: TinyModel,
    tmp_path: Path,
    table: dict[tuple[str, str, str], str],
) -> None:
    if width == 16 and form == "compressed-tensors":
        pytest.skip("nothing is packed: the plain copy is tested with the draft")
    check_pair(form, arch, (width, width), tiny_model, tmp_path / "out", table)
