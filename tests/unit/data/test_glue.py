from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cptq.data import SOURCES, glue, load_glue, load_text
from cptq.data.files import MissingDataError
from cptq.errors import DataError, UnknownNameError


def _write(root: Path, name: str, content: str | bytes) -> Path:
    path = root / "glue" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def test_sst2_has_a_header_and_no_quoting(tmp_path: Path) -> None:
    _write(tmp_path, "SST-2/dev.tsv", 'sentence\tlabel\n" good \t1\nbad " \t0\n')
    found = load_glue("sst2", "dev", data_dir=tmp_path)
    assert found.sentences == (('" good ',), ('bad " ',))
    assert found.labels == (1, 0)
    assert found.label_names == ("negative", "positive")


def test_cola_has_no_header(tmp_path: Path) -> None:
    _write(tmp_path, "CoLA/dev.tsv", "gj04\t1\t\tIt stands.\ngj04\t0\t*\tIt stand.\n")
    found = load_glue("cola", "dev", data_dir=tmp_path)
    assert found.sentences == (("It stands.",), ("It stand.",))
    assert found.labels == (1, 0)


def test_stsb_goes_by_the_names_of_its_columns(tmp_path: Path) -> None:
    _write(tmp_path, "STS-B/dev.tsv", "index\tscore\tsentence2\tsentence1\n0\t4.750\tb\ta\n")
    found = load_glue("stsb", "dev", data_dir=tmp_path)
    assert (found.sentences, found.labels, found.label_names) == ((("a", "b"),), (4.75,), ())


MNLI_HEAD = "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse"
MNLI_HEAD += "\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
MRPC_HEAD = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
AX_HEAD = "Lexical Semantics\tPredicate-Argument Structure\tLogic\tKnowledge\tDomain\tPremise"
AX_HEAD += "\tHypothesis\tLabel\n"
#: task -> (file in the original layout, its text, one row of the Hub, sentences, label, its name)
ORIGINALS: dict[str, tuple[str, str, dict[str, Any], tuple[str, str], int, str]] = {
    "mrpc": (
        "MRPC/dev.tsv",
        MRPC_HEAD + '1\t7\t8\tHe said " yes .\tHe agreed .\n',
        {"sentence1": 'He said " yes .', "sentence2": "He agreed .", "label": 1},
        ('He said " yes .', "He agreed ."),
        1,
        "equivalent",
    ),
    "qqp": (
        "QQP/dev.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tWhy?\tHow?\t0\n",
        {"question1": "Why?", "question2": "How?", "label": 0},
        ("Why?", "How?"),
        0,
        "not_duplicate",
    ),
    "mnli": (
        "MNLI/dev_matched.tsv",
        MNLI_HEAD + "0\t1\t1c\tslate\t(\t(\t(\t(\tIt rains.\tIt is dry.\tx\tcontradiction\n",
        {"premise": "It rains.", "hypothesis": "It is dry.", "label": 2},
        ("It rains.", "It is dry."),
        2,
        "contradiction",
    ),
    "mnli-mm": (
        "MNLI/dev_mismatched.tsv",
        MNLI_HEAD + "0\t1\t1n\tslate\t(\t(\t(\t(\tIt rains.\tIt is May.\tx\tneutral\n",
        {"premise": "It rains.", "hypothesis": "It is May.", "label": 1},
        ("It rains.", "It is May."),
        1,
        "neutral",
    ),
    "qnli": (
        "QNLI/dev.tsv",
        "index\tquestion\tsentence\tlabel\n0\tWho?\tShe did.\tentailment\n",
        {"question": "Who?", "sentence": "She did.", "label": 0},
        ("Who?", "She did."),
        0,
        "entailment",
    ),
    "rte": (
        "RTE/dev.tsv",
        "index\tsentence1\tsentence2\tlabel\n0\ta b\tc d\tnot_entailment\n",
        {"sentence1": "a b", "sentence2": "c d", "label": 1},
        ("a b", "c d"),
        1,
        "not_entailment",
    ),
    "wnli": (
        "WNLI/dev.tsv",
        "index\tsentence1\tsentence2\tlabel\n0\ta b\tc d\t1\n",
        {"sentence1": "a b", "sentence2": "c d", "label": 1},
        ("a b", "c d"),
        1,
        "entailment",
    ),
    "ax": (
        "AX/diagnostic-full.tsv",
        AX_HEAD + "\t\tNegation\t\tNews\tThe cat sat.\tNo cat sat.\tcontradiction\n",
        {"premise": "The cat sat.", "hypothesis": "No cat sat.", "label": 2},
        ("The cat sat.", "No cat sat."),
        2,
        "contradiction",
    ),
}


@pytest.mark.parametrize("task", ORIGINALS)
def test_the_original_file_and_the_hub_give_the_same_set(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, content, row, sentences, label, label_name = ORIGINALS[task]
    monkeypatch.setattr(glue, "load_hub_rows", lambda *_, **__: [row])
    hub = load_glue(task, "dev")
    ours = load_glue(task, "dev", data_dir=_write(tmp_path, name, content))
    assert ours.sentences == (sentences,)
    assert ours.labels == (label,)
    assert ours.label_names[label] == label_name
    assert (ours.sha256, ours.label_names) == (hub.sha256, hub.label_names)


def test_every_task_of_glue_is_here() -> None:
    known = {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "mnli-mm", "qnli", "rte", "wnli", "ax"}
    assert set(glue.GLUE_TASKS) == known
    assert {f"glue/{task}" for task in known - {"mnli-mm", "ax"}} < set(SOURCES)


def test_broken_lines_of_qqp_are_left_out_and_counted(tmp_path: Path) -> None:
    name, content, *_ = ORIGINALS["qqp"]
    _write(tmp_path, name, content + "1\t2\tcut short\n" + "2\t3\t4\tA?\tB?\t1\n")
    found = load_glue("qqp", "dev", data_dir=tmp_path)
    assert found.labels == (0, 1)
    assert len(found.notes) == 1
    assert "1 lines of dev.tsv" in found.notes[0]


def test_a_word_that_is_not_a_label_is_refused(tmp_path: Path) -> None:
    for label in ("0", "hidden", "Entailment"):
        text = f"index\tsentence1\tsentence2\tlabel\n0\ta\tb\t{label}\n"
        _write(tmp_path, "RTE/dev.tsv", text)
        with pytest.raises(DataError, match=repr(label)) as caught:
            load_glue("rte", "dev", data_dir=tmp_path)
        assert caught.value.allowed == "entailment, not_entailment"


def test_the_hubs_copy_of_ax_has_no_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"premise": "a", "hypothesis": "b", "label": -1}
    monkeypatch.setattr(glue, "load_hub_rows", lambda *_, **__: [row])
    with pytest.raises(DataError, match="nyu-mll/glue ax") as caught:
        load_glue("ax", "dev")
    assert "glue/AX/diagnostic-full.tsv" in str(caught.value.hint)


def test_the_directory_may_be_that_of_glue_itself(tmp_path: Path) -> None:
    _write(tmp_path, "CoLA/dev.tsv", "gj04\t1\t\tIt stands.\n")
    assert len(load_glue("cola", "dev", data_dir=tmp_path / "glue")) == 1


@pytest.mark.parametrize(
    ("task", "split", "size", "positive"),
    [("sst2", "dev", 872, 444), ("cola", "dev", 1043, 721), ("stsb", "dev", 1500, None)],
)
def test_real_sets_have_their_published_sizes(
    data_dir: Path, task: str, split: Any, size: int, positive: int | None
) -> None:
    found = load_glue(task, split, data_dir=data_dir)
    assert len(found) == size
    assert positive is None or sum(found.labels) == positive


def test_the_labelled_test_part_of_stsb_is_the_original_one(data_dir: Path) -> None:
    found = load_glue("stsb", "test", data_dir=data_dir)
    assert len(found) == 1379
    assert found.labels[0] == 2.5
    assert found.sentences[0] == ("A girl is styling her hair.", "A girl is brushing her hair.")


def test_training_sentences_are_a_text_source(tmp_path: Path) -> None:
    _write(tmp_path, "SST-2/train.tsv", "sentence\tlabel\none \t1\ntwo\t0\n")
    text = load_text("glue/sst2", "calibration", data_dir=tmp_path)
    assert text.documents == ("one ", "two")
    assert text.rows == ("one", "two")
    assert text.origin.endswith("SST-2/train.tsv")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("SST-2/dev.tsv", "text\tlabel\na\t1\n", "sentence; it has text, label"),
        ("SST-2/dev.tsv", "sentence\tlabel\nonly\n", "line 2 has 1"),
        ("SST-2/dev.tsv", "sentence\tlabel\na\t2\n", "'2'; allowed: 0, 1"),
        ("SST-2/dev.tsv", "sentence\tlabel\na\tx\n", "'x'"),
        ("SST-2/dev.tsv", "sentence\tlabel\n", "dev.tsv"),
        ("SST-2/dev.tsv", "", "dev.tsv"),
        ("SST-2/dev.tsv", b"sentence\tlabel\nna\xefve\t1\n", "0xef at offset 17"),
    ],
)
def test_a_malformed_set_names_what_is_wrong(
    tmp_path: Path, name: str, content: str | bytes, words: str
) -> None:
    _write(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        load_glue("sst2", "dev", data_dir=tmp_path)
    assert words in str(caught.value)


def test_a_score_out_of_range_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, "STS-B/dev.tsv", "sentence1\tsentence2\tscore\na\tb\t5.1\n")
    with pytest.raises(DataError, match=r"'5\.1'") as caught:
        load_glue("stsb", "dev", data_dir=tmp_path)
    assert "0 to 5" in str(caught.value.allowed)


def test_missing_and_unlabelled_parts_say_so(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"glue/SST-2/dev\.tsv"):
        load_glue("sst2", "dev", data_dir=tmp_path)
    with pytest.raises(DataError, match=r"test .*cola") as caught:
        load_glue("cola", "test", data_dir=tmp_path)
    assert caught.value.allowed == "train, dev"
    with pytest.raises(DataError, match=r"train .*ax") as caught:
        load_glue("ax", "train", data_dir=tmp_path)
    assert caught.value.allowed == "dev"
    with pytest.raises(UnknownNameError, match="'sst-2'") as unknown:
        load_glue("sst-2", "dev", data_dir=tmp_path)
    assert "'sst2'" in str(unknown.value.hint)


def test_rows_of_the_hub_become_the_same_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_hub_rows(
        repository: str, config: str, split: str, **_: object
    ) -> list[dict[str, Any]]:
        assert (repository, config, split) == ("nyu-mll/glue", "cola", "validation")
        return [{"sentence": "It stands.", "label": 1, "idx": 0}]

    monkeypatch.setattr(glue, "load_hub_rows", load_hub_rows)
    _write(tmp_path, "CoLA/dev.tsv", "gj04\t1\t\tIt stands.\n")
    ours, hub = load_glue("cola", "dev", data_dir=tmp_path), load_glue("cola", "dev")
    assert (ours.sentences, ours.labels, ours.sha256) == (hub.sentences, hub.labels, hub.sha256)
