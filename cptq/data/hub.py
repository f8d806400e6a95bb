"""Data sets from the Hub, or from the cache of an earlier download, through `datasets`.

`datasets` retries an unreachable Hub for half a minute and more. So whether the Hub can be reached
is checked first, within seconds; with HF_HUB_OFFLINE set only the cache is read.
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cptq.data.files import WAYS, MissingDataError

REACH_SECONDS = 5.0
_FALSE = ("", "0", "false", "no", "off")


def is_offline() -> bool:
    """Whether the environment forbids using the Hub."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    return any(os.environ.get(name, "").lower() not in _FALSE for name in names)


def load_hub_rows(
    repository: str,
    config: str | None,
    split: str,
    *,
    cache_dir: Path | None,
    token: str | None,
    revision: str | None = None,
    data_files: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Load all rows of one split; `data_files` name single files, not the whole configuration.

    Raises:
        MissingDataError: offline and not cached, unreachable, no access, or no such data set.
    """
    cached = _is_cached(repository, "" if data_files else config or "", cache_dir)
    if not cached:
        _require_hub(repository)
    try:
        import datasets
    except ImportError as error:
        raise MissingDataError("the package datasets is not installed", hint=WAYS) from error
    try:
        found = datasets.load_dataset(
            repository,
            None if data_files else config,
            split=split,
            token=token,
            cache_dir=None if cache_dir is None else str(cache_dir),
            revision=revision,
            data_files=dict(data_files) if data_files else None,
        )
        return [dict(row) for row in found]
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise MissingDataError(
            f"datasets cannot load {repository} ({config}, {split}): {reason[0]}", hint=WAYS
        ) from error


def _is_cached(repository: str, config: str, cache_dir: Path | None) -> bool:
    """Whether `datasets` has this configuration in its cache."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")).expanduser()
    folder = (cache_dir or cache) / repository.replace("/", "___").lower() / config
    exact = (cache_dir or cache) / repository.replace("/", "___") / config
    return folder.is_dir() or exact.is_dir()


def _require_hub(repository: str) -> None:
    if is_offline():
        raise MissingDataError(
            f"{repository} is not in the cache of datasets, and HF_HUB_OFFLINE forbids using "
            "the Hub",
            hint=f"{WAYS}, or unset HF_HUB_OFFLINE",
        )
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=REACH_SECONDS).close()
    except urllib.error.HTTPError:
        return  # the Hub can be reached
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise MissingDataError(
            f"{repository} is not in the cache of datasets, and {endpoint} cannot be reached "
            f"({reason})",
            hint=WAYS,
        ) from error
