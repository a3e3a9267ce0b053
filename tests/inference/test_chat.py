"""A conversation: a growing text, commands, interrupts, a run that goes on meanwhile. All with scripted lines."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from support import settings

from lumina.api import Trainer
from lumina.checkpoint import store
from lumina.errors import UserError
from lumina.inference import chat, engine
from lumina.inference.conversation import Conversation
from lumina.inference.sampler import Sampler
from lumina.run.folder import Run
from lumina.run.lock import RunLock

LONG = "line 7: and so on, " * 5  # more than the 64 tokens of the context


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A hybrid after six steps, saved at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("chat")
    keys = settings(folder, checkpoint__keep_last=3, train__eval_every=0)
    return Trainer("tiny", root=folder / "runs", quiet=True, **keys).fit()


@pytest.fixture
def conversation(run: Run) -> Conversation:
    return Conversation(engine.load(run), Sampler(), max_tokens=10, seed=5)


@dataclass
class Terminal:
    """Plays lines (or raises what is given instead of one) and keeps what was written and said."""

    lines: list[str | BaseException | type[BaseException]]
    written: str = ""
    said: list[str] = field(default_factory=list)

    def read(self) -> str:
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if not isinstance(line, str):
            raise line
        return line

    def write(self, piece: str) -> None:
        self.written += piece

    def say(self, line: str) -> None:
        self.said.append(line)


def talk(
    run: Run, conversation: Conversation, *lines: str | type[BaseException], interactive: bool = True
) -> list[str]:
    """Plays a session; returns what was said after the introduction."""
    terminal = Terminal([*lines, "/quit"])
    chat.Chat(run, conversation, terminal.read, terminal.write, terminal.say, interactive).loop()
    return terminal.said[3:]


def test_an_answer_is_what_generate_writes_for_the_same_text(conversation: Conversation) -> None:
    model, texts = conversation.model, []
    pieces: list[str] = []
    for line in ("line 7", "more", "", "line"):
        before = conversation.text
        if line and before and not before.endswith("\n"):
            before += "\n"
        answer = conversation.answer(line, pieces.append)
        texts.append(model.generate(before + line, 10, seed=5 + len(texts)))
        assert answer.text == texts[-1]
        assert conversation.text == before + line + answer.text
    assert "".join(pieces) == "".join(texts)
    assert [turn.role for turn in conversation.turns] == ["user", "assistant"] * 2 + ["assistant", "user", "assistant"]


def test_what_is_counted_is_what_happened(conversation: Conversation) -> None:
    answer = conversation.answer("line 7", lambda piece: None)
    assert answer.prompt_tokens == 1 + len("line 7")  # bytes and the token before a document
    assert (answer.tokens, answer.reason, answer.left_out) == (10, "length", 0)
    assert answer.cache_entries[0::2] == [7 + 10 - 1] * 2  # the last token was never stored
    assert all(entries <= 16 for entries in answer.cache_entries[1::2])
    assert answer.seconds > 0
    conversation.max_tokens = 1000
    answer = conversation.answer(LONG, lambda piece: None)
    assert (answer.prompt_tokens, answer.reason) == (32, "context")
    assert answer.prompt_tokens + answer.tokens - 1 == 64


def test_the_oldest_text_is_left_out_counted_and_said_but_the_system_text_stays(
    run: Run, conversation: Conversation
) -> None:
    model = conversation.model
    said = talk(run, conversation, "/system Be brief.", LONG)
    head, room = model.encode("Be brief.\n"), 64 - 10
    whole = model.encode("Be brief.\n" + LONG)
    last = conversation.last
    assert last is not None
    assert last.left_out == len(whole) - room
    assert said[1:] == [
        f"(the context of 64 tokens is full: with 10 of them for the answer, the oldest {len(whole) - room} tokens "
        "were left out)"
    ]
    ids, _ = conversation.prompt(conversation.turns[:1])
    assert ids == head + whole[-(room - len(head)) :]
    cache = model.new_cache()
    again = "".join(model.stream_ids(ids, 10, 5, Sampler(), cache))
    assert again == last.text


def test_a_system_text_that_leaves_no_room_is_refused(run: Run, conversation: Conversation) -> None:
    said = talk(run, conversation, "/system short", f"/system {LONG}", "/system")
    assert said[1].startswith("/system: 95 tokens are too many: of 54")
    assert said[2] == "before the conversation now: nothing"
    talk(run, conversation, "/system short", f"/system {LONG}")
    assert conversation.system == "short"


@pytest.mark.parametrize(
    ("line", "needle"),
    [
        ("/temp", "a number is missing"),
        ("/temp hot", "'hot' is not a number"),
        ("/temp -1", "temperature=-1.0: must be 0"),
        ("/temp nan", "temperature=nan"),
        ("/temp inf", "temperature=inf"),
        ("/topk 2.5", "'2.5' is not a whole number"),
        ("/topk", "a whole number is missing"),
        ("/topk -3", "top_k=-3: must be 0"),
        ("/topp 0", "top_p=0.0: must be in (0, 1]"),
        ("/topp 2", "top_p=2.0"),
        ("/save", "a file name is missing"),
        ("/tmep 1", "did you mean /temp?"),
        ("/zzz", "/help lists them"),
        ("/", "no such command"),
        ("ab\udcff", "not UTF-8 text at character 3"),
    ],
)
def test_a_bad_line_is_one_line_and_changes_nothing(
    line: str, needle: str, run: Run, conversation: Conversation
) -> None:
    conversation.answer("line 7", lambda piece: None)
    before = (conversation.turns, conversation.sampler, conversation.system, conversation.model.step)
    (said,) = talk(run, conversation, line)
    assert needle in said
    assert "\n" not in said
    assert before == (conversation.turns, conversation.sampler, conversation.system, conversation.model.step)


def test_settings_act_and_are_said(run: Run, conversation: Conversation) -> None:
    said = talk(run, conversation, "/temp 0", "/topk 3", "/topp 0.5", "line 7", "/reset", "line 7")
    assert said[2] == "temperature 0, top_k 3, top_p 0.5"
    assert conversation.sampler == Sampler(0.0, 3, 0.5)
    greedy = conversation.model.generate("line 7", 10, temperature=0.0)
    assert conversation.text == "line 7" + greedy


def test_text_may_begin_with_a_slash(run: Run, conversation: Conversation) -> None:
    talk(run, conversation, "//etc", "/quit", "never read")
    assert conversation.turns[0].text == "/etc"
    assert len(conversation.turns) == 2


def test_help_names_every_command(run: Run, conversation: Conversation) -> None:
    said = "\n".join(talk(run, conversation, "/help"))
    assert all(f"\n  {name} " in said for name in chat.COMMANDS)


def interrupting(after: int) -> Callable[[str], None]:
    """A `write` during whose n-th call somebody presses ctrl-C."""
    pieces: list[str] = []

    def write(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == after:
            raise KeyboardInterrupt

    return write


def test_an_interrupt_ends_the_answer_only(run: Run, conversation: Conversation) -> None:
    whole = conversation.model.generate("line 7", 10, seed=5)
    terminal = Terminal(["line 7", KeyboardInterrupt, "/stats", "more"])
    session = chat.Chat(run, conversation, terminal.read, interrupting(4), terminal.say, interactive=True)
    session.loop()
    partial, more = conversation.turns[1], conversation.turns[3]
    assert whole.startswith(partial.text)
    assert 0 < len(partial.text) < len(whole)
    assert (partial.reason, more.reason) == ("interrupted", "length")
    assert "(interrupted; what was written stays" in terminal.said[3]
    assert chat.HOW_TO_LEAVE in terminal.said[4]
    assert more.text == conversation.model.generate(f"line 7{partial.text}\nmore", 10, seed=6)


def test_an_interrupt_of_a_pipe_ends_the_program(run: Run, conversation: Conversation) -> None:
    terminal = Terminal(["line 7", "more"])
    session = chat.Chat(run, conversation, terminal.read, interrupting(4), terminal.say, interactive=False)
    with pytest.raises(KeyboardInterrupt):
        session.loop()
    assert terminal.lines == ["more"]


def test_stats_measure(run: Run, conversation: Conversation) -> None:
    assert talk(run, conversation, "/stats")[-1] == "answer    none yet"
    model, context, sampling, answer, cache = talk(run, conversation, "line 7", "/stats")
    last = conversation.last
    assert last is not None
    parameters = sum(p.numel() for p in conversation.model.transformer.parameters())
    assert f"step 6 of {run.path}: hybrid, {parameters:,} parameters" in model
    assert context.endswith(
        f"{len(conversation.model.encode(conversation.text))} of 64 tokens; 0 older ones are left out"
    )
    assert "temperature 0.8, top_k 0, top_p 0.9, at most 10 tokens" in sampling
    assert f"10 tokens in {last.seconds:.2f} s, {10 / last.seconds:.1f} tokens/s, 7 read before" in answer
    routed = sum(last.cache_entries[1::2]) / 2
    assert f"16.0 in each of 2 full blocks, {routed:.1f} in each of 2 routed blocks" in cache


def test_the_transcript_is_saved_and_never_overwrites(run: Run, conversation: Conversation, tmp_path: Path) -> None:
    lines, text = tmp_path / "talk.jsonl", tmp_path / "talk.txt"
    said = talk(run, conversation, "/system Böse", "line 7", f"/save {lines}", f"/save {text}", "x", f"/save {text}")
    assert said[1:] == [f"wrote {lines}", f"wrote {text}", f"/save: {text} exists already; give another name"]
    answer = conversation.turns[1].text
    assert [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()] == [
        {"role": "system", "content": "Böse"},
        {"role": "user", "content": "line 7"},
        {"role": "assistant", "content": answer, "step": 6, "reason": "length"},
    ]
    assert text.read_bytes().decode() == f"Böse\nline 7{answer}"


@contextmanager
def unprivileged() -> Iterator[None]:
    """Nobody in particular: the superuser may write into a read-only folder."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_that_takes_no_file(run: Run, conversation: Conversation, tmp_path: Path) -> None:
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o500)
    talk(run, conversation, "line 7")
    with unprivileged(), pytest.raises(UserError) as refused:
        chat.save(conversation, f"{folder}/x.txt")
    assert f"{folder}/x.txt was not written: Permission denied" in str(refused.value)
    assert not any(folder.iterdir())
    (missing,) = talk(run, conversation, f"/save {tmp_path}/none/x.txt")
    assert "No such file or directory" in missing
    assert len(conversation.turns) == 2


def test_a_disk_that_fills_up_leaves_no_half_transcript(
    conversation: Conversation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation.answer("line 7", lambda piece: None)
    full = Path("/dev/full").open("w")  # noqa: SIM115  # closed by `save`

    def open_full(path: Path, *_: object, **__: object) -> object:
        path.touch()
        return full

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(UserError, match="No space left"):
        chat.save(conversation, str(tmp_path / "x.txt"))
    assert not any(tmp_path.iterdir())


def test_a_run_that_trains_meanwhile(run: Run, tmp_path: Path) -> None:
    """Its lock is held, newer checkpoints appear, and a reload takes the newest whole one."""
    live = Run(tmp_path / "live")
    shutil.copytree(run.path, live.path, symlinks=True)
    for step in (4, 6):
        store.folder(live.checkpoints, step).rename(tmp_path / f"{step}")
    conversation = Conversation(engine.load(live), Sampler(), max_tokens=5, seed=0)
    assert conversation.model.step == 2
    terminal = Terminal([])
    script = iter(["line 7", "save 4", "save 6", "", "/reload", "save 8", "", "/reload", "/reload", "", "/quit"])
    shutil.copytree(tmp_path / "6", tmp_path / "8")  # one that cannot be whole

    def read() -> str:
        line = next(script)
        if line.startswith("save"):
            step = line.removeprefix("save ")
            (tmp_path / step).rename(store.folder(live.checkpoints, int(step)))
        return line

    with RunLock(live.lock):
        chat.Chat(live, conversation, read, terminal.write, terminal.say, interactive=True).loop()
    assert [line for line in terminal.said[3:] if not line.startswith("(")] == [
        "the run has saved step 4; /reload takes it",
        "step 6 instead of 2",
        "the run has saved step 8; /reload takes it",
        *["! skipped step-000008: COMPLETE belongs to step 6", "step 6, as before"] * 2,
    ]
    assert [turn.step for turn in conversation.turns if turn.step is not None] == [2] * 4 + [6] * 3


def test_a_checkpoint_that_is_deleted_while_it_is_read(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = Run(tmp_path / "live")
    shutil.copytree(run.path, live.path, symlinks=True)
    load = store.load

    def late(found: store.Checkpoint, *tensors: dict[str, torch.Tensor]) -> None:
        if found.step == 6:
            shutil.rmtree(found.path)
        load(found, *tensors)

    monkeypatch.setattr(store, "load", late)
    assert engine.load(live).step == 4
