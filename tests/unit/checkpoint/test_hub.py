"""What a user types as a model, and what is said where nothing can be had for it."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import errors

from cptq.checkpoint import hub
from cptq.config import ModelSettings
from cptq.errors import ModelError
from cptq.types import Event, Progress

NAME = "somebody/some-model"


def resolve(model: str, events: list[Event] | None = None, **options: Any) -> Path:
    return hub.resolve_checkpoint(
        ModelSettings(model=model, **options), (events if events is not None else []).append
    )


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception, *, offline: bool = False) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", offline)


def hub_error(kind: type[Exception], text: str = "401 Client Error.\nmore") -> Exception:
    """One of the Hub's errors without the HTTP response that its constructor asks for."""
    error = kind.__new__(kind)
    error.args = (text,)
    return error


def test_a_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, AssertionError("the Hub was asked"))
    assert resolve(str(tmp_path)) == tmp_path
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/model") == Path("org/model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/org/model") == tmp_path / "org" / "model"


def test_a_file_in_place_of_a_directory(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ModelError, match=re.escape(str(file))) as caught:
        resolve(str(file))
    assert caught.value.hint == f"try {tmp_path}"


@pytest.mark.parametrize("model", ["./no/such", "/no/such/place", "~/no-such-place", "a/b/c"])
def test_a_path_that_is_not_there_never_asks_the_hub(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, AssertionError("the Hub was asked"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=re.escape(repr(model))) as caught:
        resolve(model)
    assert "Hub id" in str(caught.value.allowed)


@pytest.mark.parametrize("model", ["no-such-model", NAME])
def test_an_unknown_model_offline(model: str, tmp_path: Path) -> None:
    """The real Hub client, which HF_HUB_OFFLINE keeps from asking, and an empty cache."""
    events: list[Event] = []
    with pytest.raises(ModelError, match=re.escape(repr(model))) as caught:
        resolve(model, events, cache_dir=tmp_path)
    assert "HF_HUB_OFFLINE" in str(caught.value)
    assert events == [Progress(stage="download", done=0, total=None, message=model)]


def test_a_name_that_the_hub_would_not_take(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'not a name!'") as caught:
        resolve("not a name!", cache_dir=tmp_path)
    assert "--token" in str(caught.value)


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (errors.GatedRepoError, (f"{NAME} is gated", "--token")),
        (errors.RevisionNotFoundError, (f"{NAME} has no revision 'v9'",)),
        (errors.RepositoryNotFoundError, (f"unknown model '{NAME}'", "private model", "--token")),
        (errors.HFValidationError, (f"unknown model '{NAME}'", "no such model on the Hub")),
    ],
)
def test_what_the_hub_says_is_explained(
    kind: type[Exception], words: tuple[str, ...], offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, hub_error(kind), offline=offline)
    with pytest.raises(ModelError) as caught:
        resolve(NAME, revision="v9")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert isinstance(caught.value.__cause__, kind)


@pytest.mark.parametrize(
    "error",
    [
        hub_error(errors.HfHubHTTPError, "503 Server Error.\nmore"),
        hub_error(errors.HfHubHTTPError.__bases__[0], "503 Server Error.\nmore"),
        hub_error(errors.LocalEntryNotFoundError, "503 Server Error.\nmore"),
        ConnectionError("503 Server Error.\nmore"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_unreachable_hub_is_told_from_an_unknown_model(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, error)
    with pytest.raises(ModelError, match=r"503 Server Error\.[^\n]*$"):
        resolve(NAME)
    failing(monkeypatch, error, offline=True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        resolve(NAME)


def test_an_error_without_words_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, TimeoutError())
    with pytest.raises(ModelError, match="TimeoutError"):
        resolve(NAME)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(errno.EACCES, "Permission denied", "/cache"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_hub_is_not_blamed_for_this_machine(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, error)
    with pytest.raises(type(error)) as caught:
        resolve(NAME)
    assert caught.value is error


@pytest.mark.parametrize("code", [False, True])
@pytest.mark.parametrize("pickle", [False, True])
def test_only_what_is_wanted_is_downloaded(
    code: bool, pickle: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    options = {"revision": "v1", "token": "secret", "cache_dir": tmp_path}
    path = resolve(NAME, trust_remote_code=code, allow_pickle=pickle, **options)
    assert path == tmp_path
    assert asked["name"] == NAME
    assert {name: asked[name] for name in options} == options
    patterns = asked["allow_patterns"]
    assert {"*.safetensors", "*.json"} <= set(patterns)
    assert ("*.py" in patterns) is code
    assert ("*.bin" in patterns) is pickle
