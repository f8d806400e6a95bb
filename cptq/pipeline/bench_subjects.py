"""The models of `cptq bench` before they run: what they are, from settings and headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cptq.artifact.gguf.header import read_gguf
from cptq.checkpoint.files import find_weight_files, read_tensor_specs
from cptq.checkpoint.loader import pick_device, pick_dtype, read_spec
from cptq.config import GGUF, BenchSettings
from cptq.errors import ModelError, UsageError
from cptq.evaluation.tasks.footprint import count_weight_bytes
from cptq.report.bench import name_models
from cptq.types import Emit

TRANSFORMERS, LLAMA_CPP = "transformers", "llama.cpp"
CAUSAL = "causal-lm"
_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model that will be measured.

    Attributes:
        name: short and distinct.
        source: as it was given.
        path: its directory or file.
        engine: what runs it.
        kind: of model.
        vocabulary: ids below this number are tokens.
        context: most tokens of a sequence (None: not known).
        device: where it runs.
        dtype: type it computes in.
        file_bytes: of its weight files; a GGUF file holds its vocabulary too.
    """

    name: str
    source: str
    path: Path
    engine: str
    kind: str
    vocabulary: int
    context: int | None
    device: str
    dtype: str
    file_bytes: int


def describe_subjects(settings: BenchSettings, emit: Emit) -> list[Subject]:
    """Describe each model from its settings and headers; no weight is read.

    Raises:
        ModelError: a model is not found, or is not one that can be measured.
    """
    found = []
    for name, source in zip(name_models(settings.sources), settings.sources, strict=True):
        describe = _describe_gguf if source.endswith(GGUF) else _describe_checkpoint
        found.append(describe(settings, name, source, emit))
    return found


def _describe_checkpoint(settings: BenchSettings, name: str, source: str, emit: Emit) -> Subject:
    model = replace(settings.model, model=source)
    spec = read_spec(model, emit)
    device = pick_device(model.device)
    stored = read_tensor_specs(spec.path) if find_weight_files(spec.path) else {}
    return Subject(
        name=name,
        source=source,
        path=spec.path,
        engine=TRANSFORMERS,
        kind=spec.kind,
        vocabulary=int(spec.config.get_text_config().vocab_size),
        context=spec.max_positions,
        device=str(device),
        dtype=str(pick_dtype(model.dtype, device, stored)).removeprefix("torch."),
        file_bytes=count_weight_bytes(spec.path),
    )


def _describe_gguf(settings: BenchSettings, name: str, source: str, emit: Emit) -> Subject:
    path = Path(source).expanduser()
    header = read_gguf(path)
    architecture = str(header.metadata.get("general.architecture"))
    embedding = next((t for t in header.tensors if t.name == "token_embd.weight"), None)
    if embedding is None or header.metadata.get(f"{architecture}.attention.causal") is False:
        raise ModelError(
            f"{source} holds a model of type {architecture}, which writes no text",
            allowed="GGUF files of causal language models",
        )
    if pick_device(settings.model.device).type != "cpu":
        raise UsageError(f"{source} is run on the CPU alone", hint="add --device cpu for all")
    context = header.metadata.get(f"{architecture}.context_length")
    return Subject(
        name=name,
        source=source,
        path=path,
        engine=LLAMA_CPP,
        kind=CAUSAL,
        vocabulary=embedding.shape[0],
        context=context if isinstance(context, int) else None,
        device="cpu",
        dtype="as stored",
        file_bytes=path.stat().st_size,
    )


def check_alike(subjects: Sequence[Subject]) -> None:
    """Refuse models of several kinds, whose figures do not compare.

    Raises:
        UsageError: names each model with its kind.
    """
    if len({subject.kind for subject in subjects}) > 1:
        listed = ", ".join(f"{subject.name} is {subject.kind}" for subject in subjects)
        raise UsageError(
            f"the models are of several kinds: {listed}", hint="name models of one kind"
        )


def check_lengths(subjects: Sequence[Subject], prompt: int, new: int) -> None:
    """Refuse a prompt (with its new tokens, where there are any) beyond a context.

    Raises:
        UsageError: names the model and both numbers.
    """
    generates = subjects[0].kind == CAUSAL
    length = prompt + new if generates else prompt
    for subject in subjects:
        if subject.context is not None and length > subject.context:
            flags = "--prompt-tokens and --new-tokens make" if generates else "--prompt-tokens is"
            raise UsageError(
                f"{flags} {length}, and the context of {subject.name} is {subject.context}",
                hint="give a smaller --prompt-tokens",
            )


def read_into_cache(path: Path) -> None:
    """Read the weight files once, so that the system may hold them in its cache."""
    files = [path] if path.is_file() else find_weight_files(path)
    for file in files:
        with file.open("rb") as stream:
            while stream.read(_CHUNK):
                pass
