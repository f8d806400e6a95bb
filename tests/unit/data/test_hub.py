from __future__ import annotations

from pathlib import Path

import pytest

from cptq.data import load_text
from cptq.data.files import MissingDataError
from cptq.data.hub import is_offline

ROWS = ["", " = A = \n", "", " B . \n"]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache of `datasets` as an earlier download of WikiText-2's test part left it."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "Salesforce___wikitext" / "wikitext-2-raw-v1" / "0.0.0" / ("0" * 40)
    folder.mkdir(parents=True)
    made = datasets.Dataset.from_dict({"text": ROWS})
    writer = datasets.arrow_writer.ArrowWriter(
        path=str(folder / "wikitext-test.arrow"), features=made.features
    )
    for row in made:
        writer.write(row)
    examples, size = writer.finalize()
    split = {"name": "test", "num_bytes": size, "num_examples": examples}
    info = datasets.DatasetInfo(
        features=made.features,
        builder_name="parquet",
        dataset_name="wikitext",
        config_name="wikitext-2-raw-v1",
        version="0.0.0",
        splits={"test": split | {"dataset_name": "wikitext"}},
    )
    info.write_to_directory(str(folder))
    return tmp_path


def test_offline_the_cache_of_an_earlier_download_is_read(cache: Path) -> None:
    text = load_text("wikitext", "evaluation", cache_dir=cache)
    assert text.documents == tuple(ROWS)
    assert text.origin == "Salesforce/wikitext wikitext-2-raw-v1 test (Hub)"


def test_a_part_that_is_not_in_the_cache_is_missing(cache: Path) -> None:
    with pytest.raises(MissingDataError, match=r"WikiText-2 train .*Salesforce/wikitext"):
        load_text("wikitext", "calibration", cache_dir=cache)
    assert load_text("auto", "calibration", cache_dir=cache).source == "pydoc"


@pytest.mark.parametrize(
    ("value", "expected"), [("1", True), ("ON", True), ("0", False), ("", False)]
)
def test_offline_as_the_ecosystem_reads_it(
    monkeypatch: pytest.MonkeyPatch, value: str, expected: bool
) -> None:
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert is_offline() is expected
