"""What a file format has to offer, so that nothing outside its own file branches on its name.

`Format` is the whole of it. `SafetensorsFormat` does most of it for those that are ordinary
checkpoints (safetensors and a config.json): a new one says which tensors a layer becomes, what
config.json must say about them, and how they are read back.
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
from cptq.layouts.safetensors_header import measure, total_bytes
from cptq.types import CompressedLayer, Emit, LayerResult, LayerSpec, ModelKind, TensorSpec


class Format(ABC):
    """One way to lay a compressed model on the disk."""

    name: ClassVar[str]
    layout: Layout
    #: tags of the model card, and the library that it names
    tags: tuple[str, ...] = ()
    library: str | None = "transformers"

    @abstractmethod
    def check(self, content: Content) -> None:
        """Refuse what the format cannot hold, or holds wrongly; before anything is written.

        Raises:
            ArtifactError: names the layers and says why.
        """

    @abstractmethod
    def nbytes(self, content: Content) -> int:
        """Bytes of the weight files to be, or a little more."""

    @abstractmethod
    def write(self, content: Content, place: Path, emit: Emit) -> dict[str, int]:
        """Write the weights, and all that the format's readers need, into an empty directory.

        Returns:
            {file name: bytes} of the files with weights.
        """

    @abstractmethod
    def digests(self, place: Path, files: Iterable[str]) -> dict[str, str]:
        """sha256 (hex) of every tensor in the weight files, read back."""

    @abstractmethod
    def check_reload(
        self,
        place: Path,
        kind: ModelKind,
        sample: ReloadSample,
        emit: Emit,
        source: Path | None = None,
    ) -> ReloadCheck:
        """Load what was written in a fresh process, as a user would, and compare.

        Args:
            place: the directory that was written.
            kind: of model.
            sample: inputs and expected outputs.
            emit: receives what must be said.
            source: the directory that it was made from, where it is at hand.

        Raises:
            ArtifactError: it does not load, or answers differently.
        """

    @abstractmethod
    def describe_loading(self, content: Content) -> Sequence[str]:
        """Lines of Markdown for the model card."""

    def label(self, content: Content) -> str:
        """What the manifest calls it."""
        return self.name


class CheckpointFormat(Format):
    """A format that `from_pretrained` loads."""

    #: modules that a fresh process imports before it loads; none means stock transformers
    imports: tuple[str, ...] = ()
    #: name of the weight file without its ending
    stem: str = "model"

    def digests(self, place: Path, files: Iterable[str]) -> dict[str, str]:
        return compute_tensor_digests(place / name for name in files)

    def check_reload(
        self,
        place: Path,
        kind: ModelKind,
        sample: ReloadSample,
        emit: Emit,
        source: Path | None = None,
    ) -> ReloadCheck:
        return reload_in_fresh_process(
            place,
            kind,
            sample.inputs,
            sample.expected,
            tolerance=sample.tolerance,
            attention=sample.attention,
            trust_remote_code=sample.trust_remote_code,
            imports=self.imports,
            partial=sample.partial,
        )


class SafetensorsFormat(CheckpointFormat):
    """A checkpoint in which some tensors stand for the weight of a compressed layer."""

    @abstractmethod
    def check_layer(self, layer: CompressedLayer) -> None:
        """Refuse a layer; raises ArtifactError."""

    @abstractmethod
    def list_layer_tensors(self, layer: CompressedLayer) -> tuple[TensorSpec, ...]:
        """The tensors of a layer, as shapes and types; what `layout` counts."""

    @abstractmethod
    def pack_layer_tensor(self, layer: CompressedLayer, spec: TensorSpec) -> Tensor:
        """The value of one of `layer_specs`."""

    @abstractmethod
    def read_layer(
        self, spec: LayerSpec, result: LayerResult, get: Callable[[str], Tensor]
    ) -> CompressedLayer:
        """The inverse: a layer from its tensors, `get` giving them by name, as they are stored.

        `spec` and `result` are those of the manifest, whose word on shape, bits and group size
        must be checked against the tensors.

        Raises:
            ArtifactError: the tensors are not what the manifest says.
        """

    @abstractmethod
    def build_quantization_config(self, content: Content) -> dict[str, Any] | None:
        """What config.json says about the compressed layers; None: nothing."""

    def check(self, content: Content) -> None:
        for layer in content.compressed.values():
            self.check_layer(layer)

    def nbytes(self, content: Content) -> int:
        return total_bytes(map(measure, self._specs(content)))

    def write(self, content: Content, place: Path, emit: Emit) -> dict[str, int]:
        packed = {
            spec.name: layer
            for layer in content.compressed.values()
            for spec in self.list_layer_tensors(layer)
        }

        def value(spec: TensorSpec) -> Tensor:
            layer = packed.get(spec.name)
            return content.dense(spec) if layer is None else self.pack_layer_tensor(layer, spec)

        # a dense copy is for everyone, whatever the format
        stem = self.stem if content.compressed else "model"
        files = write_weights(place, self._specs(content), value, stem=stem)
        write_config(content.path, self.build_quantization_config(content), place)
        copy_companions(content, place, emit)
        return files

    def _specs(self, content: Content) -> list[TensorSpec]:
        """All tensors of the file, compressed weights replaced in place."""
        packed = {n: self.list_layer_tensors(layer) for n, layer in content.compressed.items()}
        return replace_tensors(content.tensors, packed)


def build_refusal(names: Sequence[str], what: str, *, allowed: str) -> ArtifactError:
    """An error that names some of the layers that a format cannot hold."""
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return ArtifactError(f"{some}: {what}", allowed=allowed)
