"""The report in a browser: nothing is wider than the window, at two widths."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cptq.report import Summary
from cptq.report.render import render_html

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), "")
#: writes the widths of document and window, and what is too wide, into the outer page
PROBE = """<script>
const wide = document.documentElement.scrollWidth, room = document.documentElement.clientWidth;
const out = [...document.querySelectorAll("main *:not(.scroll *)")].filter(
  e => e.getBoundingClientRect().right > room + 1).map(e => e.tagName + "." + e.className);
parent.document.title = `WIDTHS ${wide} ${room} ${out.join(" ")}`;
</script></body>"""


def open_page(text: str, folder: Path, width: int) -> str:
    """Return the outer document of a page shown `width` pixels wide; its picture is written.

    In a frame, as a browser's window has a least width.
    """
    inside = html.escape(text.replace("</body>", PROBE), quote=True)
    size = f'style="border:0;width:{width}px;height:2400px"'
    page = folder / "frame.html"
    page.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><title>none</title><body style="margin:0">'
        f'<iframe {size} srcdoc="{inside}"></iframe>',
        encoding="utf-8",
    )
    flags = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *(f"--user-data-dir={folder / 'profile'}", f"--window-size={width},2400"),
        *(f"--screenshot={folder / f'{width}.png'}", "--dump-dom", page.as_uri()),
    ]
    done = subprocess.run([BROWSER, *flags], capture_output=True, text=True, timeout=120)
    return done.stdout


def find_too_wide(text: str, folder: Path, width: int) -> tuple[int, int, str]:
    """Return the widths of the document and of its window, and the elements that stick out."""
    found = re.search(r"<title>WIDTHS (\d+) (\d+) ([^<]*)", open_page(text, folder, width))
    assert found is not None, "the page did not open"
    assert (folder / f"{width}.png").stat().st_size > 10_000
    return int(found[1]), int(found[2]), found[3].strip()


@pytest.mark.skipif(not BROWSER, reason="no chromium or google-chrome to open the report with")
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_window(summary: Summary, tmp_path: Path, width: int) -> None:
    assert find_too_wide(render_html(summary), tmp_path, width) == (width, width, "")


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no chromium or google-chrome to open the report with")
def test_the_probe_sees_what_sticks_out(summary: Summary, tmp_path: Path) -> None:
    wide = '<p style="width:900px">wide</p></main>'
    text = render_html(summary).replace("</main>", wide)
    assert find_too_wide(text, tmp_path, 400) == (920, 400, "P.")
