"""The files that a checkpoint needs elsewhere: tokenizer, generation settings, template, licence.

Copied byte for byte from the model's directory; a sentence-transformers model brings the modules
that its modules.json names. Links (a Hub snapshot is made of them) are followed.
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
    """What is copied, relative to the model's directory, sorted.

    Args:
        directory: the model's.
        code: Python files as well (a model that runs its own code).

    Raises:
        ArtifactError: modules.json is unreadable or names a place outside the directory.
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
    """Folders of a sentence-transformers model's modules, the transformer itself left out."""
    path = directory / MODULES
    if not path.exists():
        return []
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        folders = [str(m["path"]) for m in modules if not m["type"].endswith("Transformer")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is no list of modules ({type(error).__name__})") from error
    for folder in folders:
        if Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise ArtifactError(f"{path} names {folder!r}, which lies outside the model")
    return [folder for folder in folders if folder]


def copy_companions(model: Content, to: Path, emit: Emit, only: tuple[str, ...] = ()) -> list[str]:
    """Copy them; names of what was copied. What is missing is said.

    `only` restricts them to files of these patterns, for formats that hold the rest themselves.
    """
    code = "auto_map" in read_config(model.path) and not only
    names = list_companions(model.path, code=code)
    names = [name for name in names if _match_any([name], only)] if only else names
    for name in names:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model.path / name, to / name)
    if code:
        message = "the model runs its own code, which was copied along"
        emit(Notice(kind="info", subject=model.source, message=message))
    if not _match_any(names, LICENCE):
        message = "no licence file lies beside the model, so none was copied"
        emit(Notice(kind="info", subject=model.source, message=message))
    if model.tokenizer is not None and not only and not _match_any(names, TOKENIZER):
        model.tokenizer.save_pretrained(to)
        message = "no tokenizer files lie beside the model; the loaded tokenizer was saved instead"
        emit(Notice(kind="fallback", subject=model.source, message=message))
    return [str(name) for name in names]


def _match_any(names: list[Path], patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name.name.lower(), pattern) for name in names for pattern in patterns)


def count_companion_bytes(directory: Path, *, code: bool = False) -> int:
    """Bytes of all that is copied."""
    return sum((directory / name).stat().st_size for name in list_companions(directory, code=code))


def read_config(directory: Path) -> dict[str, Any]:
    """The model's config.json as it is written."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return config


def write_config(
    directory: Path, quantization: dict[str, Any] | None, to: Path, dtype: str | None = None
) -> None:
    """config.json: the model's own, and what says how the weights are stored.

    `dtype` is the type of the dense weights where it is no longer the model's own.
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
