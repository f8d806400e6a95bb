"""cptq: analyze, compress and evaluate Hugging Face models."""

__version__ = "0.1.0"
