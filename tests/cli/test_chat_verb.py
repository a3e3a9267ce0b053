"""`lumina chat` as it is started: once, through a pipe, and at a terminal with ctrl-C."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from support import settings, write_text

from lumina.api import Trainer
from lumina.cli import main
from lumina.inference import engine
from lumina.inference.chat import HOW_TO_LEAVE, NOT_TRAINED
from lumina.run.folder import Run
from lumina.run.lock import RunLock

GREEDY = ["--temperature", "0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A dense byte model with a context that takes a while to fill."""
    folder = tmp_path_factory.mktemp("chat")
    keys = settings(folder, "dense", train__steps=2, model__seq_len=2048, train__batch_tokens=2048)
    write_text(folder, lines=1500)  # enough to hold a sequence out
    return Trainer("tiny", root=folder / "runs", quiet=True, **keys).fit()


def test_one_answer(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["chat", str(run.path), "-p", "line 7", "--max-tokens", "8", "--seed", "3", "--top-k", "50"]
    text = engine.load(run).generate("line 7", 8, seed=3, top_k=50)
    with RunLock(run.lock):  # as if it trained
        assert main(arguments) == 0
        said = capsys.readouterr()
        assert main([*arguments, "--json"]) == 0
    assert said.out == text + "\n"
    assert said.err.splitlines()[-1] == NOT_TRAINED
    answer = json.loads(capsys.readouterr().out)
    assert (answer["text"], answer["prompt"], answer["step"], answer["reason"]) == (text, "line 7", 2, "length")
    assert (answer["run"], answer["tokens"], answer["prompt_tokens"]) == (str(run.path), 8, 7)


def test_json_needs_a_prompt(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(run.path), "--json"]) == 2
    assert "-p TEXT" in capsys.readouterr().err


def test_a_pipe_draws_no_prompt_and_carries_the_text_only(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = b"line 7\n/temp cold\nab\xff\n/reset\nline 7\r\n\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(script), encoding="utf-8"))
    assert main(["chat", str(run.path), "--max-tokens", "8", *GREEDY]) == 0
    said = capsys.readouterr()
    model = engine.load(run)
    first = model.generate("line 7", 8, temperature=0)
    second = model.generate("line 7" + first, 8, temperature=0)
    assert said.out == f"{first}\n{first}\n{second}\n"
    assert "/temp: 'cold' is not a number" in said.err
    assert "not UTF-8 text at character 3" in said.err


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_is_not_sent_control_characters(
    terminal: bool, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lumina.data.tokenizer.TextStream.feed", lambda *_: "\x1b[2J\n\t\x9bé")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert main(["chat", str(run.path), "-p", "x", "--max-tokens", "1"]) == 0
    written = "\ufffd[2J\n\t\ufffdé" if terminal else "\x1b[2J\n\t\x9bé"
    assert capsys.readouterr().out.startswith(written)


# `lumina`, whose answers take their time: an interruption is never too late.
SLOWLY = """
import sys, time
from lumina.cli import main
from lumina.data.tokenizer import TextStream

feed = TextStream.feed

def slowly(*what):
    time.sleep(0.05)
    return feed(*what)

TextStream.feed = slowly
sys.exit(main())
"""


class Terminal:
    """A program at a terminal of its own: what it wrote so far, and what it is sent."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        command = [sys.executable, "-c", SLOWLY, *arguments]
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        os.close(slave)
        self.text = ""

    def send(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read(self) -> None:
        ready, _, _ = select.select([self._master], [], [], 60)
        assert ready, f"nothing more came after {self.text!r}"
        self.text += os.read(self._master, 4096).decode(errors="replace")

    def wait_for(self, text: str) -> str:
        """Reads until `text` has come; returns what came before it, and forgets both."""
        while text not in self.text:
            self.read()
        come, _, self.text = self.text.rpartition(text)
        return come

    def interrupt_until(self, text: str) -> None:
        """Interrupts again and again: readline notices no signal between its prompt and its wait for a key."""
        while text not in self.text:
            self.process.send_signal(signal.SIGINT)
            if select.select([self._master], [], [], 0.5)[0]:
                self.read()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(run: Run) -> Iterator[Terminal]:
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, it would be for the program, too
    terminal = Terminal("chat", str(run.path), "--max-tokens", "100000", *GREEDY)
    yield terminal
    terminal.close()
    signal.signal(signal.SIGINT, previous)


def test_ctrl_c_ends_the_answer_and_the_conversation_goes_on(terminal: Terminal) -> None:
    before = terminal.wait_for("> ")
    assert NOT_TRAINED in before
    assert HOW_TO_LEAVE in before
    terminal.send("line 7\n")
    terminal.wait_for("line 7\r\n")
    terminal.read()  # the answer has begun; 1,024 tokens would follow
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for("(interrupted; what was written stays in the conversation)")
    terminal.wait_for("> ")
    terminal.interrupt_until(HOW_TO_LEAVE)
    terminal.wait_for("> ")
    terminal.send("/stats\n")
    stats = terminal.wait_for("full blocks")
    (tokens,) = re.findall(r"answer +(\d+) tokens in", stats)
    assert 0 < int(tokens) < 1024
    terminal.wait_for("> ")
    terminal.send("\x04")
    assert terminal.process.wait(timeout=60) == 0
