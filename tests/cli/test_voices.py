"""How the program speaks: to a terminal, into a pipe, quietly, and to programs."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import write_text

from lumina.cli import main
from lumina.telemetry.console import Console, Long, Screen
from lumina.training.oversight import Oversight
from lumina.training.session import Session

TINY = ["train", "tiny", "data.train=text.txt", "train.steps=12", "checkpoint.every=0"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    return tmp_path


def at_terminal(*arguments: str, stop: bool = False, **environment: str) -> tuple[str, int]:
    """What a command draws in a terminal of 60 columns, and its exit code. `stop`: ctrl-C at step 5."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "lumina", *arguments],
        stdin=slave, stdout=slave, stderr=slave, env=os.environ | {"COLUMNS": "60", "TERM": "xterm"} | environment,
    )  # fmt: skip
    os.close(slave)
    drawn, sent, end = b"", False, time.monotonic() + 120
    while time.monotonic() < end:
        if not select.select([master], [], [], 0.1)[0]:
            if process.poll() is not None:
                break
            continue
        try:
            drawn += os.read(master, 65536)
        except OSError:  # the other end was closed
            break
        if stop and not sent and b"[Step 5]" in drawn:
            process.send_signal(signal.SIGINT)
            sent = True
    os.close(master)
    return drawn.decode(), process.wait(timeout=60)


def lines_left(drawn: str) -> list[str]:
    """What a person sees at the end: each line after its last erasure, without colours."""
    seen: list[str] = []
    for raw in drawn.replace("\r\n", "\n").split("\n"):
        if "\x1b[1A" in raw and seen:  # the cursor goes up: what stood there is drawn over
            seen.pop()
        line = re.split(r"\x1b\[2?K", raw)[-1]
        seen.append(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", line))
    return [line for line in seen if line]


def test_a_terminal_has_one_status_line_that_is_gone_at_the_end(here: Path) -> None:
    drawn, code = at_terminal(*TINY)
    assert code == 0
    assert re.search(r"\d+% · step \d+ of 12 · loss", drawn)
    assert "\x1b[2K" in drawn  # in place
    left = lines_left(drawn)
    assert not any("· step" in line for line in left), left
    assert [line.split("]")[0] for line in left if line.startswith("[Step")] == [
        "[Step 1",
        "[Step 5",
        "[Step 10",
        "[Step 12",
    ]
    status = re.findall(r"\d+% · step [^\r\x1b\n]*", drawn)
    assert max(map(len, status)) < 60  # never wider than the terminal
    assert drawn.count("\x1b[?25l") == drawn.count("\x1b[?25h")  # the cursor is back


def test_ctrl_c_leaves_a_clean_terminal(here: Path) -> None:
    arguments = ["train", "tiny", "data.train=text.txt", "train.steps=100000", "checkpoint.every=0"]
    drawn, code = at_terminal(*arguments, stop=True)
    assert code == 3
    left = lines_left(drawn)
    assert sum("stopping after this step" in line for line in left) == 1
    assert not any("· step" in line for line in left), left
    assert left[-1].startswith("next   lumina resume")


def test_a_run_that_is_handed_over_says_where_the_reason_is_and_how_to_pass(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(session: Session) -> None:
        session.ending = "looked"

    monkeypatch.setattr(Oversight, "after_step", lambda oversight: stop(oversight.session))
    assert main(TINY) == 3
    *_, why, next_ = capsys.readouterr().out.splitlines()
    assert re.match(r"why    lumina decisions runs/\S+ +# looked: the orchestrator knows nothing", why)
    assert re.match(r"next   lumina resume runs/\S+ .*orchestrator.mode=advise", next_)


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {}], ids=["no-color", "color"])
def test_colour_is_for_terminals_that_want_it(environment: dict[str, str], here: Path) -> None:
    drawn, _ = at_terminal(*TINY, **environment)
    assert ("\x1b[36m[Eval" in drawn) == (not environment)


def test_a_dumb_terminal_has_plain_lines(here: Path) -> None:
    drawn, code = at_terminal(*TINY, TERM="dumb")
    assert code == 0
    assert "\x1b" not in drawn
    assert "· step" not in drawn


def test_a_pipe_has_plain_lines_and_so_has_the_log(here: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "lumina", *TINY], capture_output=True, timeout=120)
    (log,) = here.glob("runs/*/log.txt")
    for text in (done.stdout, log.read_bytes()):
        assert b"\r" not in text
        assert b"\x1b" not in text
        assert b"[Step 12]" in text


def without_times(log: Path) -> list[str]:
    """The lines of a log, without what the clock, the machine's load and others on its disk decide."""
    lines = [line for line in log.read_text().splitlines() if not line.startswith("[Save")]  # the disk decides when
    lines = [
        re.sub(r"\| [^|]*tok/s.*|, loader.*|matmul.*|; [^;]* are free|in \d.*|\| \d+s|\d\d:\d\d:\d\d|runs\S*", "", line)
        for line in lines
    ]
    return [re.sub(r"\s+$", "", line) for line in lines]


def test_quiet_prints_the_folder_and_json_the_events_and_both_keep_the_log(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, "--fresh"]) == 0
    capsys.readouterr()
    assert main([*TINY, "--fresh", "--quiet"]) == 0
    quiet = capsys.readouterr()
    assert quiet.err == ""
    (line,) = quiet.out.splitlines()
    assert (here / line / "config.yaml").is_file()

    assert main([*TINY, "--fresh", "--json"]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    events = [json.loads(line) for line in told.out.splitlines()]
    assert events[-1]["t"] == "end"
    assert told.out == (here / events[0]["path"] / "events.jsonl").read_text()
    one, *others = [without_times(log) for log in here.glob("runs/*/log.txt")]
    assert all(other == one for other in others)
    assert len(others) == 2


def test_quiet_still_says_what_is_wrong(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    console.write("[Step 1]")
    console.write("! step 7: not finite")
    assert capsys.readouterr().out == "! step 7: not finite\n"
    assert main(["train", "tiny", "data.train=none", "-q"]) == 2
    assert "none: no such file" in capsys.readouterr().err


def test_errors_for_programs_are_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny", "train.lr=-1", "--json"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "train.lr=-1" in json.loads(said.err)["error"]["message"]
    assert main([*TINY, "--json", "--quiet"]) == 2
    capsys.readouterr()
    assert main(["generate", "n" * 300, "-p", "x", "--json"]) == 2  # no room foresees the system's own refusal
    assert "File name too long" in json.loads(capsys.readouterr().err)["error"]["message"]


def test_programs_learn_of_a_run_that_is_finished(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--json"]) == 0
    begun, *_, ended = map(json.loads, capsys.readouterr().out.splitlines())
    for command in (TINY, ["resume", begun["path"]]):
        assert main([*command, "--json"]) == 0
        assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [begun, ended]


def test_generate_answers_programs_with_one_document(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "-q"]) == 0
    run = capsys.readouterr().out.strip()
    assert main(["generate", run, "-p", "line 7", "--max-tokens", "5", "--seed", "3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["run"], told["step"], told["prompt"], told["reason"], told["seed"]) == (run, 12, "line 7", "length", 3)
    assert main(["generate", run, "-p", "line 7", "--max-tokens", "5", "--seed", "3", "-q"]) == 0
    assert capsys.readouterr() == (f"line 7{told['text']}\n", "")


class FakeScreen(Screen):
    def __init__(self, live: bool) -> None:
        self.live = live
        self.drawn: list[str] = []

    def print(self, line: str) -> None:
        self.drawn.append(line)

    def status(self, line: str) -> None:
        self.drawn.append(f"status {line}")


@pytest.mark.parametrize("live", [True, False], ids=["terminal", "pipe"])
def test_what_takes_over_two_seconds_is_shown_and_what_does_not_is_not(live: bool) -> None:
    now = 0.0
    screen = FakeScreen(live)
    long = Long(screen, clock=lambda: now)
    for second in range(5):
        now = second if live else 5.0 * second
        long("encoding", second, 8)
    long("encoding", 8, 8)
    long("hashing", 0, 2)  # quick: says nothing
    long("hashing", 2, 2)
    if live:
        bar = "━" * 6 + "─" * 18
        assert screen.drawn[0] == f"status encoding {bar}  25% ETA 6s"
        assert screen.drawn[-1] == "status "
        assert len(screen.drawn) == 4
    else:
        assert screen.drawn == ["       encoding …", "       encoding: done in 20s"]


@pytest.mark.parametrize(("live", "drawn"), [(True, ["status compiling …", "status "]), (False, [])])
def test_what_is_one_whole_stands_at_the_bottom_of_a_terminal_from_its_start(live: bool, drawn: list[str]) -> None:
    now = 0.0
    screen = FakeScreen(live)
    long = Long(screen, clock=lambda: now)
    for now in (1.0, 4.0):
        long("compiling", int(now > 1), 1)
    assert screen.drawn == drawn
    long("compiling", 0, 1)
    now = 20.0
    long("compiling", 1, 1)
    assert screen.drawn[-1] == ("status " if live else "       compiling: done in 16s")
