"""The interface of a file format, so that no other module branches on a format's name.

`Format` is the full interface. `SafetensorsFormat` implements most of it for ordinary checkpoints
(safetensors and a config.json): a new one defines which tensors a layer becomes, their entry in
config.json, and how they are read back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from cptq.artifact.companions import copy_companions, write_config
from cptq.artifact.content import Content
from cptq.artifact.reload import ReloadCheck, ReloadSample, reload_in_fresh_process
from cptq.artifact.weights import compute_tensor_digests, write_weights
from cptq.errors import ArtifactError
from cptq.layouts import Layout
from cptq.layouts.interface import replace_tensors
from cptq.layouts.safetensors_header import measure, sum_bytes
from cptq.types import CompressedLayer, Emit, LayerResult, LayerSpec, ModelKind, TensorSpec


class Format(ABC):
    """One way to store a compressed model on disk."""

    name: ClassVar[str]
    layout: Layout
    #: tags and library of the model card
    tags: tuple[str, ...] = ()
    library: str | None = "transformers"
    #: whether a loaded model holds its weights multiplied out
    multiplied_out: bool = False
    #: whether weights are split over files of `Content.shard_bytes`
    sharded: bool = True
    #: whether rules of activation sparsity are stored, and applied by what loads the format
    holds_rules: bool = False

    @abstractmethod
    def check(self, content: Content) -> None:
        """Refuse content that the format cannot hold, before anything is written.

        Raises:
            ArtifactError: names the layers and the reason.
        """

    @abstractmethod
    def estimate_bytes(self, content: Content) -> int:
        """Return the bytes of the weight files to be, or a little more."""

    @abstractmethod
    def write(self, content: Content, place: Path, emit: Emit) -> dict[str, int]:
        """Write the weights and the files that loaders need into an empty directory.

        Returns:
            {file name: bytes} of the weight files.
        """

    @abstractmethod
    def compute_digests(self, place: Path, files: Iterable[str]) -> dict[str, str]:
        """Read the weight files and return the sha256 (hex) of every tensor."""

    @abstractmethod
    def check_reload(
        self,
        place: Path,
        kind: ModelKind,
        sample: ReloadSample,
        emit: Emit,
        source: Path | None = None,
    ) -> ReloadCheck:
        """Load the written directory in a fresh process, as a user would, and compare outputs.

        Args:
            place: the directory that was written.
            kind: of model.
            sample: inputs and expected outputs.
            emit: receives notices.
            source: the directory that it was made from, if available.

        Raises:
            ArtifactError: it does not load, or its outputs differ.
        """

    @abstractmethod
    def describe_loading(self, content: Content) -> Sequence[str]:
        """Return the lines of Markdown on loading for the model card."""

    def label(self, content: Content) -> str:
        """Return the name of the format in the manifest."""
        return self.name


class CheckpointFormat(Format):
    """A format that `from_pretrained` loads."""

    #: modules to import in the fresh process before loading; none means stock transformers
    imports: tuple[str, ...] = ()
    #: name of the weight file without its ending
    stem: str = "model"

    def compute_digests(self, place: Path, files: Iterable[str]) -> dict[str, str]:
        return compute_tensor_digests(place / name for name in files)

    def check_reload(
        self,
        place: Path,
        kind: ModelKind,
        sample: ReloadSample,
        emit: Emit,
        source: Path | None = None,
    ) -> ReloadCheck:
        return reload_in_fresh_process(place, kind, sample, imports=self.imports)


class SafetensorsFormat(CheckpointFormat):
    """A checkpoint in which some tensors encode the weight of a compressed layer."""

    @abstractmethod
    def check_layer(self, layer: CompressedLayer) -> None:
        """Raise ArtifactError if the format cannot hold a layer."""

    @abstractmethod
    def list_layer_tensors(self, layer: CompressedLayer) -> tuple[TensorSpec, ...]:
        """List the tensors of a layer as shapes and types, as `layout` counts them."""

    @abstractmethod
    def pack_layer_tensor(self, layer: CompressedLayer, spec: TensorSpec) -> Tensor:
        """Return the value of one of `list_layer_tensors`."""

    @abstractmethod
    def read_layer(
        self, spec: LayerSpec, result: LayerResult, get: Callable[[str], Tensor]
    ) -> CompressedLayer:
        """Read a layer from its stored tensors, which `get` returns by name.

        `spec` and `result` come from the manifest; their shape, bits and group size must be checked
        against the tensors.

        Raises:
            ArtifactError: the tensors do not match the manifest.
        """

    @abstractmethod
    def build_quantization_config(self, content: Content) -> dict[str, Any] | None:
        """Build the entry of config.json for the compressed layers; None for no entry."""

    def check(self, content: Content) -> None:
        for layer in content.compressed.values():
            self.check_layer(layer)

    def estimate_bytes(self, content: Content) -> int:
        return sum_bytes(map(measure, self._list_tensors(content)), content.shard_bytes)

    def write(self, content: Content, place: Path, emit: Emit) -> dict[str, int]:
        packed = {
            spec.name: layer
            for layer in content.compressed.values()
            for spec in self.list_layer_tensors(layer)
        }

        def get_value(spec: TensorSpec) -> Tensor:
            layer = packed.get(spec.name)
            return content.get_dense(spec) if layer is None else self.pack_layer_tensor(layer, spec)

        # a dense copy loads everywhere, whatever the format
        stem = self.stem if content.compressed else "model"
        specs = self._list_tensors(content)
        files = write_weights(place, specs, get_value, most=content.shard_bytes, stem=stem)
        write_config(content.path, self.build_quantization_config(content), place)
        copy_companions(content, place, emit)
        return files

    def _list_tensors(self, content: Content) -> list[TensorSpec]:
        """List all tensors of the file, compressed weights replaced in place."""
        packed = {n: self.list_layer_tensors(layer) for n, layer in content.compressed.items()}
        return replace_tensors(content.tensors, packed)


def build_refusal(names: Sequence[str], what: str, *, allowed: str) -> ArtifactError:
    """Build an error that names some of the layers that a format cannot hold."""
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return ArtifactError(f"{some}: {what}", allowed=allowed)
