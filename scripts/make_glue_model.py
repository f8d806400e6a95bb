#!/usr/bin/env python3
"""What `scripts/make_glue_model` runs: a classifier to compress, from an encoder and GLUE.

The encoder gets a fresh head with the task's label names (one number for STS-B, trained by its
squared error on score / 5) and is trained as a whole: AdamW, a warm-up and a straight line down,
batches of similar length, dropout as the encoder has it. What is stated for the dev part is what
`cptq eval` finds on the written directory. Weights are saved in float16, as such models are shared.

Same seed and the same number of threads, same bytes.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers import logging as transformers_logging

from cptq.checkpoint.loader import load_model
from cptq.config import ModelSettings
from cptq.data import GlueSet, load_glue
from cptq.data.glue_layouts import TRAINED
from cptq.errors import CptqError
from cptq.evaluation.task import EvalOptions, evaluate
from cptq.types import EvalResult

BATCH, LENGTH, WARM_UP, LOG_EVERY = 32, 128, 0.06, 25
POOL = 32  # batches that are sorted by length together


def head_options(found: GlueSet) -> dict[str, Any]:
    """What the model's config says of its outputs."""
    if not found.label_names:
        return {"num_labels": 1, "problem_type": "regression"}
    names = dict(enumerate(found.label_names))
    return {
        "num_labels": len(names),
        "id2label": names,
        "label2id": {name: index for index, name in names.items()},
        "problem_type": "single_label_classification",
    }


def drawn(found: GlueSet, examples: int, seed: int) -> list[int]:
    """The samples to train on, in random order."""
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return order[: min(examples, len(found))].tolist()


def batches(found: GlueSet, chosen: Sequence[int], seed: int) -> Iterator[list[int]]:
    """Samples of similar length together, in random order: half the padding, the same training."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(chosen), generator=generator).tolist()
    shuffled = [chosen[i] for i in order]
    for start in range(0, len(shuffled), BATCH * POOL):
        pool = sorted(
            shuffled[start : start + BATCH * POOL],
            key=lambda i: sum(map(len, found.sentences[i])),
        )
        groups = [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
        for i in torch.randperm(len(groups), generator=generator).tolist():
            yield groups[i]


def inputs(tokenizer: Any, found: GlueSet, rows: Sequence[int], device: str) -> dict[str, Tensor]:
    """One batch with its labels; pairs are given to the tokenizer as pairs."""
    columns = zip(*(found.sentences[i] for i in rows), strict=True)
    batch = tokenizer(
        *map(list, columns), padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    labels = torch.tensor([found.labels[i] for i in rows])
    batch["labels"] = labels.long() if found.label_names else labels.float() / 5
    return {name: value.to(device) for name, value in batch.items()}


def train(
    model: Any, tokenizer: Any, found: GlueSet, given: argparse.Namespace
) -> list[dict[str, float]]:
    """Train in place; the mean loss of every LOG_EVERY steps."""
    chosen = drawn(found, given.examples, given.seed)
    steps = given.epochs * -(-len(chosen) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.rate, weight_decay=0.01)
    curve, recent, step = [], [], 0
    model.train()
    for epoch in range(given.epochs):
        for rows in batches(found, chosen, given.seed + epoch):
            share = (step + 1) / steps
            factor = min(share / WARM_UP, (1 - share) / (1 - WARM_UP) + 1 / steps)
            optimizer.param_groups[0]["lr"] = given.rate * factor
            recent.append(_step(model, inputs(tokenizer, found, rows, given.device), optimizer))
            step += 1
            if step % LOG_EVERY == 0 or step == steps:
                loss = sum(recent) / len(recent)
                curve.append({"step": step, "loss": round(loss, 4)})
                print(f"step {step} of {steps}: loss {loss:.3f}", file=sys.stderr)
                recent = []
    return curve


def _step(model: Any, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> float:
    loss = model(**batch).loss
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def dev_results(place: Path, given: argparse.Namespace) -> list[EvalResult]:
    """What `cptq eval OUT --task glue/TASK` finds."""
    settings = ModelSettings(model=str(place), device=given.device, dtype="float32")
    model = load_model(settings, lambda event: None)
    options = EvalOptions(batch_size=BATCH, data_dir=given.data_dir, seed=given.seed)
    return evaluate(model, f"glue/{given.task}", options, lambda event: None)


def encoder_tokenizer(encoder: str) -> Any:
    """The encoder's tokenizer.

    Raises:
        CptqError: the directory holds no checkpoint, or nothing to pad sentences with.
    """
    if Path(encoder).is_dir() and not (Path(encoder) / "config.json").is_file():
        raise CptqError(f"{encoder} holds no config.json", hint="name the folder of the checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    if tokenizer.pad_token_id is None:
        raise CptqError(
            f"the tokenizer of {encoder} has no padding token, and batches of sentences need one",
            allowed="an encoder, such as all-MiniLM-L6-v2",
        )
    return tokenizer


def make(given: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Train, write into `place` and measure; the record that is written there too."""
    begin = time.perf_counter()
    found = load_glue(given.task, "train", data_dir=given.data_dir)
    torch.manual_seed(given.seed)
    tokenizer = encoder_tokenizer(given.encoder)
    model = AutoModelForSequenceClassification.from_pretrained(
        given.encoder, dtype=torch.float32, **head_options(found)
    ).to(given.device)
    curve = train(model, tokenizer, found, given)
    model.half().save_pretrained(place)
    tokenizer.save_pretrained(place)
    record = {
        "encoder": Path(given.encoder).name,
        "task": f"glue/{given.task}",
        "data": Path(found.origin).name if Path(found.origin).exists() else found.origin,
        "data_sha256": found.sha256,
        "examples": min(given.examples, len(found)),
        "of": len(found),
        "steps": int(curve[-1]["step"]),
        "batch": BATCH,
        "rate": given.rate,
        "loss": curve,
        "dev": [
            {"metric": r.metric, "value": r.value, "stderr": r.stderr, "samples": r.samples}
            for r in dev_results(place, given)
        ],
        "seed": given.seed,
        "threads": torch.get_num_threads(),
        "device": given.device,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    (place / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def run(given: argparse.Namespace) -> None:
    """Make the model beside its place, then rename it into it."""
    out = (given.caller / given.out).resolve()
    if out.exists():
        raise CptqError(f"{out} is already there", hint="name another place, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
        place = Path(work) / out.name
        place.mkdir()
        record = make(given, place)
        place.rename(out)
    dev = ", ".join(f"{row['metric']} {row['value']:.4f}" for row in record["dev"])
    print(
        f"{out}: {record['examples']:,} of {record['of']:,} examples, {record['steps']:,} steps, "
        f"loss {record['loss'][-1]['loss']}, dev {dev}, {record['seconds']:.0f} s"
    )


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/make_glue_model", description=__doc__)
    parser.add_argument("encoder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--task", default="sst2", choices=TRAINED)
    parser.add_argument("--examples", type=int, default=8000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from", dest="caller", type=Path, default=Path(), help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if min(given.examples, given.epochs) < 1:
        parser.error("--examples and --epochs are at least 1")
    local = given.caller / given.encoder
    if not local.is_dir() and given.encoder.count("/") != 1:
        parser.error(f"no directory {given.encoder!r}, and no Hub id such as owner/name")
    given.encoder = str(local.resolve()) if local.is_dir() else given.encoder
    if given.data_dir:
        given.data_dir = (given.caller / given.data_dir).resolve()
    return given


def main() -> None:
    given = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is half made goes away
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        run(given)
    except (CptqError, OSError, ValueError) as error:
        sys.exit(f"Error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
