"""Measure a model once, and plan it for three sizes without measuring again.

    python examples/plan_three_targets.py [MODEL] [OUT]

Each plan is a JSON file. Edit it by hand if you like, then carry it out with
`cptq.compress(MODEL, plan="OUT/3bit.json")` or `cptq compress MODEL --plan OUT/3bit.json`.
"""

import sys
from collections import Counter
from pathlib import Path

import cptq

MODEL, OUT = (*sys.argv[1:], *("HuggingFaceTB/SmolLM2-135M", "example-plans")[len(sys.argv) - 1 :])
TEXT = {"samples": 16, "seqlen": 128}  # small, to be quick

analysis = cptq.analyze(MODEL, metrics=["output"], out=OUT, overwrite=True, **TEXT)
scores = Path(OUT) / "sensitivity" / "output.json"
for target in ("3bit", "4bit", "5bit"):
    plan = cptq.plan(MODEL, target=target, sensitivity=scores, **TEXT)
    plan.save(Path(OUT) / f"{target}.json")
    bits = Counter(candidate.label for candidate in plan.choices.values())
    print(f"{target}: {plan.predicted_bytes:,} bytes, predicted loss {plan.predicted_loss:.4g}")
    print("  units by candidate: " + ", ".join(f"{n} {label}" for label, n in sorted(bits.items())))
