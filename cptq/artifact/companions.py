"""Copy the files that a checkpoint needs besides weights: tokenizer, settings, template, licence.

They are copied byte for byte from the model's directory, for a sentence-transformers model with the
modules that its modules.json lists. Symbolic links, as in a snapshot of the Hub, are followed.
"""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from cptq.artifact.atomic import write_bytes
from cptq.artifact.content import Content
from cptq.errors import ArtifactError
from cptq.types import Emit, Notice

TOKENIZER = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
)
LICENCE = ("licen[cs]e*", "copying*", "notice*", "use_policy*")
OTHERS = (
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
TEMPLATES = "additional_chat_templates"
MODULES = "modules.json"


def list_companions(directory: Path, *, code: bool = False) -> list[Path]:
    """List the files to copy, relative to the model's directory, sorted.

    Args:
        directory: the model's.
        code: include Python files, for a model that runs its own code.

    Raises:
        ArtifactError: modules.json is invalid or names a folder outside the directory.
    """
    patterns = (*TOKENIZER, *LICENCE, *OTHERS, *(("*.py",) if code else ()))
    found = [
        Path(path.name)
        for path in directory.iterdir()
        if path.is_file() and any(fnmatch(path.name.lower(), pattern) for pattern in patterns)
    ]
    for folder in (TEMPLATES, *_list_module_folders(directory)):
        found += [p.relative_to(directory) for p in (directory / folder).rglob("*") if p.is_file()]
    return sorted(found)


def _list_module_folders(directory: Path) -> list[str]:
    """List the folders of a sentence-transformers model's modules, except the transformer."""
    path = directory / MODULES
    if not path.exists():
        return []
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        folders = [str(m["path"]) for m in modules if not m["type"].endswith("Transformer")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is not a list of modules ({type(error).__name__})") from error
    for folder in folders:
        if Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise ArtifactError(f"{path} names {folder!r}, which lies outside the model")
    return [folder for folder in folders if folder]


def copy_companions(model: Content, to: Path, emit: Emit, only: tuple[str, ...] = ()) -> list[str]:
    """Copy the companion files, emit notices for missing ones, and return the copied names.

    `only` restricts the files to these patterns, for formats that contain the rest themselves.
    """
    code = "auto_map" in read_config(model.path) and not only
    names = list_companions(model.path, code=code)
    names = [name for name in names if _match_any([name], only)] if only else names
    for name in names:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model.path / name, to / name)
    if code:
        message = "the model runs its own code, which was copied"
        emit(Notice(kind="info", subject=model.source, message=message))
    if not _match_any(names, LICENCE):
        message = "the model's directory has no licence file, so none was copied"
        emit(Notice(kind="info", subject=model.source, message=message))
    if model.tokenizer is not None and not only and not _match_any(names, TOKENIZER):
        model.tokenizer.save_pretrained(to)
        message = "the model's directory has no tokenizer files; the loaded tokenizer was saved"
        emit(Notice(kind="fallback", subject=model.source, message=message))
    return [str(name) for name in names]


def _match_any(names: list[Path], patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name.name.lower(), pattern) for name in names for pattern in patterns)


def count_companion_bytes(directory: Path, *, code: bool = False) -> int:
    """Return the total bytes of the files to copy."""
    return sum((directory / name).stat().st_size for name in list_companions(directory, code=code))


def read_config(directory: Path) -> dict[str, Any]:
    """Read the model's config.json."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return config


def write_config(
    directory: Path, quantization: dict[str, Any] | None, to: Path, dtype: str | None = None
) -> None:
    """Write the model's config.json with the entry that describes the stored weights.

    `dtype` is the type of the dense weights if it differs from the model's.
    """
    config = read_config(directory)
    config.pop("quantization_config", None)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    if quantization is not None:
        config["quantization_config"] = quantization
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    write_bytes(to / "config.json", text.encode())
