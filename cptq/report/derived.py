"""report.json: the summary, and what the other reports derive from it, so that all say the same.

`docs/report.schema.json` is its JSON Schema.
"""

from __future__ import annotations

from typing import Any

from cptq.report.before_after import compare_before_after, tell
from cptq.report.parts import advise, list_parts
from cptq.report.sensitivity_axis import measure_depth
from cptq.report.summary import Summary, convert_to_plain


def build_json(summary: Summary) -> dict[str, Any]:
    """Return the data of report.json.

    `derived` holds the sentences, the comparison before and after, the bytes by part, the advice
    about them, and each metric's relative sensitivity in the outer blocks.
    """
    derived = {
        "sentences": tell(summary),
        "before_after": compare_before_after(summary),
        "bytes_by_part": list_parts(summary),
        "advice": advise(summary),
        "depth_sensitivity": measure_depth(summary),
    }
    return {**summary.to_dict(), "derived": convert_to_plain(derived)}
