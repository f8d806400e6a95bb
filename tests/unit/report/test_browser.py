"""The report in a browser: nothing is wider than the window, at two widths."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cptq.report import Summary
from cptq.report.render import render_html

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
#: writes the widths of document and window, and what is too wide, into the title
PROBE = """<script>
const wide = document.documentElement.scrollWidth, room = document.documentElement.clientWidth;
const out = [...document.querySelectorAll("main > *, section > *")].filter(
  e => e.getBoundingClientRect().right > room + 1).map(e => e.outerHTML.slice(0, 60));
document.title = `WIDTHS ${wide} ${room} ${out.join(" ")}`;
</script></body>"""


def open_page(page: Path, picture: Path, width: int) -> str:
    """Return the document of a page after its scripts; its picture is written."""
    flags = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *(f"--user-data-dir={picture.parent / 'profile'}", f"--window-size={width},2400"),
        *(f"--screenshot={picture}", "--dump-dom", page.as_uri()),
    ]
    done = subprocess.run([BROWSER, *flags], capture_output=True, text=True, timeout=120)
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no chromium or google-chrome to open the report with")
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_window(summary: Summary, tmp_path: Path, width: int) -> None:
    page, picture = tmp_path / "report.html", tmp_path / f"{width}.png"
    page.write_text(render_html(summary).replace("</body>", PROBE), encoding="utf-8")
    found = re.search(r"WIDTHS (\d+) (\d+) ([^<]*)", open_page(page, picture, width))
    assert found is not None, "the page did not open"
    assert picture.stat().st_size > 10_000
    assert int(found[2]) == width
    assert int(found[1]) <= width
    assert found[3].strip() == ""
