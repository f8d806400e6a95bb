"""What every command prints: in a terminal of 80 columns, and into pipes.

Nothing is wider than the terminal, no library draws bars of its own, and pipes get neither colours
nor carriage returns.
"""

from __future__ import annotations

import os
import re
import shlex
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

fcntl = pytest.importorskip("fcntl", reason="pseudo-terminals are those of Unix")
pty = pytest.importorskip("pty", reason="pseudo-terminals are those of Unix")
termios = pytest.importorskip("termios", reason="pseudo-terminals are those of Unix")

pytestmark = pytest.mark.slow
WIDTH = 80
SMALL = "--calibration pydoc --samples 4 --seqlen 64"
TEXT = "--task pydoc --limit 2 --seqlen 64"
#: MODEL: stories260k; later commands use what earlier ones wrote (made, scores)
COMMANDS = (
    "--help",
    "compress --help",
    "doctor",
    "methods",
    "methods output gptaq",
    f"compress MODEL --target 4bit -o made {SMALL}",
    f"compress MODEL --target 3bit --dry-run {SMALL}",
    f"analyze MODEL -o scores {SMALL}",
    "plan scores --target 3bit --target 4bit",
    f"plan MODEL --target 4bit --explain model.layers.0.mlp.down_proj {SMALL}",
    f"eval made --baseline MODEL -o eval {TEXT}",
    f"compare MODEL made -o compared {TEXT} --no-footprint",
    "bench MODEL made --repeats 1 --batch-size 1 --new-tokens 4",
    "generate made --prompt 'Once upon a time' --max-new-tokens 8",
    "inspect MODEL",
    "inspect made",
    "verify made",
    "export made --format dense -o dense",
    "soup MODEL dense -o soup",
    "compress no-such-model --target 4bit",
    "compres MODEL",
)
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()=>][A-Z0-9]?|\x1b\][^\x07]*\x07")
FOREIGN = re.compile(r"it/s|s/it|\d+%\|")


def build_environment() -> Mapping[str, str]:
    """Return this environment without what decides how wide or quiet the output is."""
    names = ("COLUMNS", "LINES", "NO_COLOR", "TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return kept | {"TERM": "xterm-256color", "HF_HUB_OFFLINE": "1"}


def run_in_terminal(words: list[str], place: Path) -> str:
    """Return what a command writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, WIDTH, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "cptq", *words],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=place, env=build_environment(),
    )  # fmt: skip
    os.close(theirs)
    found = b""
    while True:
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:  # on Linux a terminal that all have left is an error, elsewhere its end
            break
        if not piece:
            break
        found += piece
    os.close(ours)
    process.wait(60)
    return found.decode(errors="replace")


def run_piped(words: list[str], place: Path) -> tuple[str, str]:
    """Return what a command writes to a stdout and a stderr that are pipes."""
    done = subprocess.run(
        [sys.executable, "-m", "cptq", *words],
        capture_output=True, cwd=place, env=build_environment(), check=False,
    )  # fmt: skip
    return done.stdout.decode(), done.stderr.decode()


def list_lines(text: str) -> list[str]:
    """Return what stands on the lines of a terminal, also what was written over."""
    return re.split(r"[\r\n]+", CONTROL.sub("", text))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, stories: Path) -> tuple[Path, Path]:
    """A directory for the commands in a terminal, and one for those in pipes."""
    made = (tmp_path_factory.mktemp("terminal"), tmp_path_factory.mktemp("pipes"))
    for place in made:
        (place / "stories260k").symlink_to(stories)
    return made


@pytest.mark.parametrize("command", COMMANDS)
def test_it_fits_a_terminal_and_is_plain_in_pipes(command: str, places: tuple[Path, Path]) -> None:
    words = shlex.split(command.replace("MODEL", "stories260k"))
    shown = run_in_terminal(words, places[0])
    wide = [line for line in list_lines(shown) if len(line.rstrip()) > WIDTH]
    assert [line for line in wide if not line.startswith("Error: ")] == []  # one line, to copy from
    out, messages = run_piped(words, places[1])
    assert not {"\x1b", "\r"} & set(out + messages)
    for text in (shown, out, messages):
        assert FOREIGN.search(text) is None
        assert "Traceback" not in text
    assert out or messages
