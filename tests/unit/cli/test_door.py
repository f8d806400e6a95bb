"""The process itself: fast help, no torch, the environment, progress, sparklines."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
from rich.console import Console as RichConsole

from cptq import __version__
from cptq.cli.commands import COMMANDS
from cptq.cli.console import Console, make_printable
from cptq.cli.environment import is_debugging, set_defaults
from cptq.cli.progress import ProgressBars, ProgressLog
from cptq.cli.sparkline import WIDEST, draw_sparkline
from cptq.types import Notice, Progress


def process(*words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": "80", "PYTHONPATH": os.getcwd()}
    return subprocess.run(words, capture_output=True, text=True, env=env, check=False)


def run_lines(*lines: str) -> list[tuple[int, set[str]]]:
    """(exit code, packages imported by then) of each line, all in one process."""
    code = (
        "import sys; from cptq.cli.app import main\n"
        "for line in sys.argv[1:]:\n"
        "    try: main(line.split())\n"
        "    except SystemExit as end:\n"
        "        print('END', end.code, *{name.split('.')[0] for name in sys.modules})"
    )
    done = process(sys.executable, "-c", code, *lines)
    ends = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("END ")]
    assert len(ends) == len(lines), done.stderr
    return [(int(code), set(names)) for code, *names in ends]


def test_help_imports_no_torch_and_nothing_else_heavy() -> None:
    heavy = {"torch", "transformers", "numpy", "scipy", "datasets", "jinja2", "yaml", "rich"}
    lines = ["--help", "--version", "", *(f"{command.name} --help" for command in COMMANDS)]
    for line, (code, imported) in zip(lines, run_lines(*lines), strict=True):
        assert code == 0, line
        assert imported & heavy == set(), line


def test_an_early_refusal_imports_no_torch() -> None:
    lines = (
        "compress m --metric banana",
        "compress m --target banana",
        "compress m --allocator banana",
        "compress m --compressor banana",
        "eval m --task banana",
        "compress m -o /",
    )
    for line, (code, imported) in zip(lines, run_lines(*lines), strict=True):
        assert code == 2, line
        assert "torch" not in imported, line


def test_help_names_the_commands_and_version_the_version() -> None:
    shown = process(sys.executable, "-m", "cptq", "--help")
    for command in ("analyze", "compress", "eval"):
        assert command in shown.stdout
    assert shown.stderr == ""
    assert process(sys.executable, "-m", "cptq", "--version").stdout == f"cptq {__version__}\n"
    assert process(sys.executable, "-m", "cptq").stdout == shown.stdout


def test_every_common_option_is_offered() -> None:
    shown = process(sys.executable, "-m", "cptq", "compress", "--help").stdout
    offered = (
        "device dtype batch-size seed revision token trust-remote-code cache-dir calibration "
        "samples seqlen data-dir overwrite allow-pickle format config plan target metric allocator "
        "compressor group-size bits"
    )
    for option in offered.split():
        assert f"--{option}" in shown, option
    assert max(map(len, shown.splitlines())) <= 80


def test_the_environment_is_only_completed() -> None:
    environ = {"OMP_WAIT_POLICY": "active"}
    set_defaults(environ)
    assert environ["OMP_WAIT_POLICY"] == "active"
    assert "GOMP_SPINCOUNT" not in environ
    assert environ["TOKENIZERS_PARALLELISM"] == "false"
    assert environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
    loud = {"CPTQ_DEBUG": "1"}
    set_defaults(loud)
    assert loud["GOMP_SPINCOUNT"] == "3000"
    assert "TRANSFORMERS_VERBOSITY" not in loud
    assert is_debugging(loud)
    assert not is_debugging({"CPTQ_DEBUG": "0"})


def events(stage: str, total: int | None, *done: int) -> Sequence[Progress]:
    return [Progress(stage=stage, done=step, total=total) for step in done]


def test_a_log_gets_few_lines() -> None:
    lines: list[str] = []
    times = iter([0.0, 1.0, 40.0, 41.0, 90.0, 91.0, 92.0])
    log = ProgressLog(lines.append, clock=lambda: next(times))
    for event in [*events("compress", 4, 0, 1, 2, 3, 4, 4), *events("write", None, 0)]:
        log.update(event)
    assert lines == [
        "compress ...",
        "compress 2/4, about 40 s left",
        "compress done in 90 s",
        "write ...",
    ]


def test_a_log_says_that_a_silent_stage_is_at_work() -> None:
    lines: list[str] = []
    times = iter([0.0, 10.0, 31.0, 40.0, 99.0, 200.0])
    log = ProgressLog(lines.append, clock=lambda: next(times))
    log.update(Progress(stage="load", done=0, total=None))
    for _ in range(3):
        log.beat()
    log.update(Progress(stage="load", done=1, total=1))
    log.beat()
    assert lines == ["load ...", "load: still at work, 31 s", "load done in 99 s"]


def test_verbose_shows_every_event_and_every_notice(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(verbose=True)
    for number in range(9):
        console.emit(Progress(stage="load", done=number, total=9, message=f"file {number}"))
        console.emit(Notice(kind="info", subject=f"layer {number}", message="some"))
    shown = capsys.readouterr().err
    assert all(f"load {n}/9: file {n}" in shown for n in range(9))
    assert all(f"layer {n}" in shown for n in range(9))


def test_no_bar_of_a_library_is_shown() -> None:
    code = (
        "from cptq.cli.environment import hide_foreign_bars as hide; hide(); hide()\n"
        "from tqdm import tqdm; list(tqdm(range(3), disable=False, desc='Dispatching model'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_bars_show_every_stage_at_80_columns() -> None:
    console = RichConsole(width=80, file=io.StringIO())
    bars = ProgressBars(console)
    for event in [*events("load", None, 0), *events("measure", 9, 0, 5, 9)]:
        bars.update(event)
    bars.update(Progress(stage="compress", done=12, total=30, message="a long name " * 9))
    console.print(bars.bars.get_renderable())
    assert isinstance(console.file, io.StringIO)
    load, measure, compress = console.file.getvalue().splitlines()[-3:]
    assert load.startswith("load ")
    assert "1/1" in load
    assert "9/9" in measure
    assert compress.startswith("compress: a long name")
    assert "12/30" in compress
    assert max(map(len, (load, measure, compress))) <= 80
    bars.close()


def test_many_notices_of_little_weight_are_cut_short_and_it_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console()
    for index in range(20):
        console.emit(Notice(kind="skipped", subject=f"layer {index}", message="stays dense"))
        console.emit(Notice(kind="warning", subject=f"layer {index}", message="odd"))
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("warning:") for line in lines) == 20
    assert sum("stays dense" in line for line in lines) == 6
    assert sum("more of these follow" in line for line in lines) == 1


def test_control_characters_are_replaced() -> None:
    assert make_printable("a\x1b[31mb\x07") == "a�[31mb�"
    assert make_printable("é\n") == "é\n"


class TestSparkline:
    """A row of bars."""

    def test_from_zero(self) -> None:
        assert draw_sparkline([0.0, 0.5, 1.0]) == ("▁▅█", False)

    def test_logarithms_where_the_range_needs_them(self) -> None:
        assert draw_sparkline([1.0, 10.0, 100.0]) == ("▁▅█", True)

    def test_odd_values(self) -> None:
        assert draw_sparkline([]) == ("", False)
        assert draw_sparkline([float("nan"), float("inf")]) == ("??", False)
        assert draw_sparkline([0.0, 0.0]) == ("▁▁", False)
        assert draw_sparkline([2.0, float("nan"), 1.0])[0] == "█?▅"
        assert draw_sparkline([-1.0, 1.0]) == ("▁█", False)

    def test_long_rows_keep_their_peaks(self) -> None:
        values = [0.0] * 1000
        values[777] = 5.0
        bars, _ = draw_sparkline(values)
        assert len(bars) == WIDEST
        assert bars.count("█") == 1
