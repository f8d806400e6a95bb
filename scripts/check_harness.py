#!/usr/bin/env python3
"""`cptq eval` and lm-evaluation-harness side by side on one model: a table of both, and exit 1
where they differ by more than the tolerance (relative where a number is above 1).

The harness's own task files are used; only their data are replaced by local files, which both
sides read. WikiText-2 pages, SST-2 and CoLA are the real ones from --data-dir; the last of those
pages stand in for C4's documents, with spacing for its detokenizer to take out. The other sets are
made up, in the fields of the real ones, from sentences of that text: an answer is the rest of a
sentence, wrong answers are the rests of others. They are for agreement, not for measuring a model.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from cptq.checkpoint.loader import load_model
from cptq.checkpoint.model import LoadedModel
from cptq.config import ModelSettings
from cptq.data import load_glue, load_text
from cptq.data.corpora import C4_FILE
from cptq.evaluation.task import EvalOptions, evaluate

TOLERANCE = 1e-4
TASKS = Path(lm_eval.__file__).parent / "tasks"
LANGUAGE = {"word_perplexity": "word_perplexity", "bits_per_byte": "bits_per_byte"}
#: our task -> (the harness's file, its part, {our metric: the harness's})
CHECKED: dict[str, tuple[str, str, dict[str, str]]] = {
    "wikitext-rolling": (
        "wikitext/wikitext.yaml",
        "test",
        LANGUAGE,
    ),
    "c4-rolling": ("c4/c4.yaml", "validation", LANGUAGE),
    "sst2": ("glue/sst2/default.yaml", "validation", {"acc": "acc"}),
    "cola": ("glue/cola/default.yaml", "validation", {"matthews": "mcc"}),
    **{
        name: (f"{place}.yaml", part, {"acc": "acc", "acc_norm": "acc_norm"})
        for name, place, part in (
            ("hellaswag", "hellaswag/hellaswag", "validation"),
            ("piqa", "piqa/piqa", "validation"),
            ("arc_easy", "arc/arc_easy", "test"),
            ("openbookqa", "openbookqa/openbookqa", "test"),
        )
    },
    "winogrande": ("winogrande/default.yaml", "validation", {"acc": "acc"}),
    "boolq": ("super_glue/boolq/default.yaml", "validation", {"acc": "acc"}),
    "lambada_openai": (
        "lambada/lambada_openai.yaml",
        "test",
        {"acc": "acc", "perplexity": "perplexity"},
    ),
}


def made_rows(sentences: list[str], count: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of every multiple-choice set, from sentences of ten words and more."""
    draw = random.Random(0)
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(count):
        (head, tail), *others = (
            (w[: len(w) // 2], w[len(w) // 2 :])
            for w in (draw.choice(sentences).split() for _ in range(4))
        )
        tails = [" ".join(tail), *(" ".join(other[1]) for other in others)]
        order = draw.sample(range(4), 4)
        shuffled, gold = [tails[i] for i in order], order.index(0)
        two, right = ([tails[0], tails[1]], 0) if draw.random() < 0.5 else (tails[1::-1], 1)
        head_text, letters = " ".join(head), ["A", "B", "C", "D"]
        lettered = {"text": shuffled, "label": letters}
        rows = {
            "hellaswag": {
                "activity_label": head[0],
                "ctx_a": head_text,
                "ctx_b": "then [substeps] they  went on",
                "endings": [f"{text} [title] end" for text in shuffled],
                "label": str(gold),
            },
            "piqa": {"goal": head_text, "sol1": two[0], "sol2": two[1], "label": right},
            "arc_easy": {"question": head_text, "choices": lettered, "answerKey": letters[gold]},
            "openbookqa": {
                "question_stem": head_text,
                "choices": lettered,
                "answerKey": letters[gold],
            },
            "winogrande": {
                "sentence": f"{head_text} _ {tails[0]}",
                "option1": two[0].split()[0],
                "option2": two[1].split()[0],
                "answer": str(right + 1),
            },
            "boolq": {
                "passage": " ".join([head_text, tails[0]]),
                "question": f"does it say {two[0]}",
                "label": 1 - right,
            },
            "lambada_openai": {"text": " ".join([head_text, tails[0]])},
        }
        for name, row in rows.items():
            found.setdefault(name, []).append(row)
    return found


def published_pages(raw: str) -> Iterator[str]:
    """Pages as the data set that the harness downloads was made from the original file."""
    kept: list[str] = []
    for line in raw.split("\n"):
        bare = line.replace("= = =", "===").replace("= =", "==").strip()
        if bare.startswith("= ") and bare.endswith(" ="):
            if "\n".join(kept).strip():
                yield "\n".join(kept)
            kept = []
        kept.append(line)
    yield "\n".join(kept)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def data_for_both(folder: Path, data_dir: Path, arguments: argparse.Namespace) -> None:
    """Everything as JSON lines in `folder`, which is then a data directory of ours too."""
    raw = (data_dir / "wikitext-2-raw" / "wiki.test.raw").read_text(encoding="utf-8")
    pages = [{"page": page} for page in published_pages(raw)]
    write_jsonl(folder / "wikitext-rolling" / "test.jsonl", pages[: arguments.pages])
    documents = [{"text": row["page"]} for row in pages[-arguments.pages :]]
    for place in (f"c4/{C4_FILE}", "c4-rolling/validation.jsonl"):
        write_jsonl(folder / place, documents)
    for task in ("sst2", "cola"):
        found = load_glue(task, "dev", data_dir=data_dir)
        rows = [
            {"sentence": texts[0], "label": int(label)}
            for texts, label in zip(found.sentences, found.labels, strict=True)
        ]
        write_jsonl(folder / task / "validation.jsonl", rows[: arguments.sentences])
    rows_of = load_text("wikitext", "evaluation", data_dir=data_dir).rows
    sentences = [row for row in rows_of if 10 <= len(row.split()) <= 60]
    for name, made in made_rows(sentences, arguments.questions).items():
        write_jsonl(folder / name / f"{CHECKED[name][1]}.jsonl", made)
    for name in ("wikitext-2-raw", "glue"):
        (folder / name).symlink_to((data_dir / name).resolve())


def harness_task(folder: Path, name: str) -> str:
    """A task file that is the harness's own but for where its data lie; returns its name."""
    place, part, _ = CHECKED[name]
    task = f"local_{name.replace('-', '_')}"
    file = folder / name / f"{part}.jsonl"
    splits = "".join(
        f"{key}: {part if key.startswith(part) else 'null'}\n"
        for key in ("training_split", "validation_split", "test_split")
    )
    (folder / f"{task}.yaml").write_text(
        f"include: {TASKS / place}\ntask: {task}\ntag: null\ndataset_path: json\n"
        f"dataset_name: null\ndataset_kwargs:\n  data_files:\n    {part}: {file}\n{splits}"
    )
    return task


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--pages", type=int, default=3)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--from", dest="caller", type=Path, default=Path(), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.data_dir = (arguments.caller / arguments.data_dir).resolve()
    arguments.model = str((arguments.caller / arguments.model).resolve())
    settings = ModelSettings(model=arguments.model, device="cpu", dtype="float32")
    model = load_model(settings, lambda event: None)
    length = min(arguments.length, model.max_positions or arguments.length)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data_for_both(folder, arguments.data_dir, arguments)
        print("| task | metric | harness | cptq | difference | stderr, harness | stderr, cptq |")
        print("|---|---|---|---|---|---|---|", flush=True)
        differences = [
            difference
            for name in CHECKED
            for difference in compare(model, name, folder, length, arguments)
        ]
    print(f"\nlargest difference {max(differences):.1e}, allowed {TOLERANCE:.0e}")
    return int(max(differences) > TOLERANCE)


def harness_results(
    model: LoadedModel, name: str, folder: Path, length: int, batch_size: int
) -> dict[str, Any]:
    """The harness's results of one task.

    One task at a time: it shares forwards between requests that feed the same tokens, and loses
    scores where those of two tasks divide them in different places.
    """
    task = harness_task(folder, name)
    language_model = HFLM(
        pretrained=model.module,
        tokenizer=model.tokenizer,
        batch_size=batch_size,
        max_length=length,
    )
    found = lm_eval.simple_evaluate(
        model=language_model,
        tasks=[task],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=100,
        log_samples=False,
    )
    assert found is not None
    return dict(found["results"][task])


def compare(
    model: LoadedModel, name: str, folder: Path, length: int, arguments: argparse.Namespace
) -> Iterator[float]:
    """The differences of a task's metrics, a line printed for each."""
    theirs = harness_results(model, name, folder, length, arguments.batch_size)
    counts = dict.fromkeys(("wikitext-rolling", "c4-rolling"), arguments.pages)
    counts |= dict.fromkeys(("sst2", "cola"), arguments.sentences)
    count = counts.get(name, arguments.questions)
    # a limit of 1 would be a share
    limit = float(count) if count > 1 else 1e-9
    options = EvalOptions(
        data_dir=folder, seqlen=length, limit=limit, batch_size=arguments.batch_size
    )
    ours = {row.metric: row for row in evaluate(model, name, options, lambda event: None)}
    for metric, other in CHECKED[name][2].items():
        value, row = float(theirs[f"{other},none"]), ours[metric]
        difference = abs(row.value - value) / max(1.0, abs(value))
        error = theirs.get(f"{other}_stderr,none", "N/A")
        words = f"{error:.6f}" if isinstance(error, float) else "-"
        mine = "-" if row.stderr is None else f"{row.stderr:.6f}"
        numbers = f"{value:.6f} | {row.value:.6f} | {difference:.1e} | {words} | {mine}"
        print(f"| {name} | {metric} | {numbers} |", flush=True)
        yield difference


if __name__ == "__main__":
    sys.exit(main())
