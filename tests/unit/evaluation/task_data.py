"""Made-up data of every task, in the layouts that `cptq.data` reads."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from cptq.data.corpora import C4_FILE
from cptq.data.glue_layouts import GLUE_TASKS
from cptq.data.questions import SOURCES
from tests.tiny_models import SENTENCES

SAMPLES = 23
#: two pages of WikiText
PAGES = (
    " \n = Fox = \n \n The quick brown fox , which jumps . \n = = Dog = = \n The ( lazy ) dog \n"
)
PAGES += " = Numbers = \n \n 3 @,@ 000 's and 14 @.@ 5 \n"
LETTERS = {"text": ["red", "blue"], "label": ["A", "B"]}
#: a row of each set, and its first and last (context, continuation), lengths and answer
ROWS: dict[str, tuple[dict[str, Any], tuple[str, str], tuple[str, str], tuple[int, ...], int]] = {
    "hellaswag": (
        {
            "activity_label": "Baking",
            "ctx_a": "A man  cooks.",
            "ctx_b": "he THEN",
            "endings": ["eats. [title] End [step] it", " runs"],
            "label": "1",
        },
        ("Baking: A man cooks. He then", " eats.. End it"),
        ("Baking: A man cooks. He then", " runs"),
        (13, 4),
        1,
    ),
    "piqa": (
        {"goal": "open it", "sol1": "pull", "sol2": "push it", "label": 0},
        ("Question: open it\nAnswer:", " pull"),
        ("Question: open it\nAnswer:", " push it"),
        (4, 7),
        0,
    ),
    "arc_easy": (
        {"question": "Which?", "choices": LETTERS, "answerKey": "B"},
        ("Question: Which?\nAnswer:", " red"),
        ("Question: Which?\nAnswer:", " blue"),
        (3, 4),
        1,
    ),
    "openbookqa": (
        {"question_stem": "The sky is", "choices": LETTERS, "answerKey": " B"},
        ("The sky is", " red"),
        ("The sky is", " blue"),
        (3, 4),
        1,
    ),
    "winogrande": (
        {"sentence": "Ann met Bo, and _ left. ", "option1": "Ann", "option2": "Bo", "answer": "2"},
        ("Ann met Bo, and Ann", " left."),
        ("Ann met Bo, and Bo", " left."),
        (19, 18),
        1,
    ),
    "boolq": (
        {"passage": "It rains.", "question": "is it wet", "label": 1},
        ("It rains.\nQuestion: is it wet?\nAnswer:", " no"),
        ("It rains.\nQuestion: is it wet?\nAnswer:", " yes"),
        (2, 3),
        1,
    ),
    "lambada_openai": (
        {"text": "so he went home"},
        ("so he went", " home"),
        ("so he went", " home"),
        (4,),
        0,
    ),
}


#: set -> the field that its context begins with
TEXT_FIELDS = {
    "hellaswag": "ctx_a",
    "piqa": "goal",
    "arc_easy": "question",
    "openbookqa": "question_stem",
    "winogrande": "sentence",
    "boolq": "passage",
    "lambada_openai": "text",
}


def write_glue(root: Path, task: str) -> Path:
    """Write a task's file in its original layout: texts of many lengths, every label."""
    layout, draw = GLUE_TASKS[task], random.Random(task)
    columns = [*layout.sentences, layout.label]
    header = [str(column) for column in columns] if layout.header else []
    lines = ["\t".join(header)] if header else []
    for i in range(SAMPLES):
        texts = ['a " small dog ' * draw.randrange(1, 9) + str(i) for _ in layout.sentences]
        label = i % len(layout.label_names) if layout.label_names else round(draw.uniform(0, 5), 2)
        fields = dict(zip(columns, [*texts, label], strict=True))
        if layout.named:
            fields[layout.label] = layout.label_names[int(label)]
        order = columns if header else range(4)
        lines.append("\t".join(str(fields.get(column, "")) for column in order))
    path = root / layout.files["dev"][0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return root


def write_questions(root: Path, name: str, rows: list[Any]) -> Path:
    """Write rows of a set of questions where `load_questions` looks for them."""
    place = root / name / f"{SOURCES[name].part}.jsonl"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def write_pages(root: Path) -> Path:
    """Write the test part of WikiText-2."""
    (root / "wikitext-2-raw").mkdir(parents=True, exist_ok=True)
    (root / "wikitext-2-raw" / "wiki.test.raw").write_text(PAGES)
    return root


def write_all(root: Path) -> Path:
    """Write data of every task with a name, enough of it for the leak check to find again."""
    text = "\n".join(SENTENCES)
    for task in GLUE_TASKS:
        write_glue(root, task)
    for name in SOURCES:
        like = {"arc_challenge": "arc_easy", "lambada_standard": "lambada_openai"}.get(name, name)
        row = ROWS[like][0]
        field = TEXT_FIELDS[like]
        rows = [{**row, field: f"{sentence} {row[field]}"} for sentence in SENTENCES]
        write_questions(root, name, rows)
    scores = [f"g\tf\ty\t{i}\t{i % 5}.5\tA small dog {i}.\tA cat {i * i}." for i in range(9)]
    files = {
        "STS-B/original/sts-test.tsv": "\n".join(scores),
        "wikitext-2-raw/wiki.test.raw": f" = Text = \n {text} \n{PAGES}",
        "wikitext-103/wiki.test.raw": text,
        "ptb/ptb.test.txt": text,
        f"c4/{C4_FILE}": "".join(json.dumps({"text": s}) + "\n" for s in SENTENCES),
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root
