"""Text to calibrate and evaluate on, and labelled sentences. Nothing here needs torch."""

from cptq.data.glue import GlueSet, load_glue
from cptq.data.glue_layouts import GLUE_TASKS
from cptq.data.text import SOURCES, SUFFIXES, Text, check_source, load_file, load_text

__all__ = [
    "GLUE_TASKS",
    "SOURCES",
    "SUFFIXES",
    "GlueSet",
    "Text",
    "check_source",
    "load_file",
    "load_glue",
    "load_text",
]
