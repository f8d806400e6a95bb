"""What a model is for, and the text and task that belong to that."""

from __future__ import annotations

#: by the end of its class: (in words, text to calibrate on, task)
USES = {
    "ForSequenceClassification": ("classification", "glue/sst2", "glue/sst2"),
    "ForCausalLM": ("language modelling", "auto", "wikitext"),
    "LMHeadModel": ("language modelling", "auto", "wikitext"),
    "ForMaskedLM": ("language modelling", "auto", None),
    "Model": ("embedding", "glue/stsb", "glue/stsb"),
}


def find_use(model: str) -> tuple[str, str, str | None]:
    """Return the use of a model, a directory or a Hub id."""
    from transformers import AutoConfig

    named = (AutoConfig.from_pretrained(model).architectures or ["Model"])[0]
    return next(use for end, use in USES.items() if named.endswith(end))
