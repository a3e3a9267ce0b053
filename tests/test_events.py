from __future__ import annotations

import errno
import json
import math
import os
import resource
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import full

from lumina.errors import DiskRefused, UserError
from lumina.events import NON_FINITE, Event, EventWriter, last_event, merged, read_events
from lumina.telemetry import incidents

words = st.text().filter(lambda word: word not in NON_FINITE)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words
plain = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def step(attempt: int, n: int, **fields: Any) -> Event:
    return {"t": "step", "v": 1, "attempt": attempt, "step": n, **fields}


def resume(attempt: int, parent: int) -> Event:
    return {"t": "run", "v": 1, "attempt": attempt, "step": parent, "parent_step": parent}


def test_a_line_is_strict_json_in_the_agreed_form(log: Path) -> None:
    with EventWriter(log, attempt=2) as events:
        events.emit("step", step=7, loss=2.5)
        events.emit("system", note="hot")
    assert log.read_text() == (
        '{"t":"step","v":1,"attempt":2,"step":7,"loss":2.5}\n{"t":"system","v":1,"attempt":2,"note":"hot"}\n'
    )


def test_each_event_is_on_disk_when_emit_returns(log: Path) -> None:
    events = EventWriter(log, 0)
    events.emit("step", step=1)
    assert [event["step"] for event in read_events(log)] == [1]
    events.close()


def test_a_full_disk_is_a_user_error_that_says_how_to_go_on(log: Path) -> None:
    with EventWriter(log, attempt=0) as events:
        events.emit("step", step=1)
        with full(events), pytest.raises(DiskRefused, match=r"not written: No space left(.|\n)*lumina resume"):
            events.emit("step", step=2)
    assert [event["step"] for event in read_events(log)] == [1]


def test_lines_that_the_disk_refuses_wait_in_order_if_asked_and_one_incident_says_so(log: Path) -> None:
    heard: list[Event] = []
    with EventWriter(log, 0, [heard.append], hold=True) as events:
        events.emit("step", step=1)
        with full(events):
            events.emit("step", step=2)
            events.emit("step", step=3)
        assert [event["step"] for event in read_events(log)] == [1]
        events.emit("step", step=4)
        told = [(event["t"], event["step"]) for event in heard]
        assert told == [("step", 1), ("step", 2), ("incident", 2), ("step", 3), ("step", 4)]
        assert list(read_events(log)) == heard
        assert "No space left" in heard[2]["error"]
        with full(events):
            events.emit("step", step=5)
    assert list(read_events(log)) == heard  # closing writes what waits
    assert [event["t"] for event in heard[-2:]] == ["step", "incident"]  # a second time, so said again


@pytest.mark.parametrize("hold", [True, False])
def test_a_line_that_was_written_in_part_is_written_to_its_end_before_the_next(log: Path, hold: bool) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # Python ignores SIGXFSZ: writing more is an error
    with EventWriter(log, 0, hold=hold) as events:
        events.emit("step", step=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + 10, limits[1]))
        try:
            with nullcontext() if hold else pytest.raises(DiskRefused, match="File too large"):
                events.emit("step", step=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert len(log.read_bytes().splitlines()[1]) == 10
        events.emit("end", step=3)
    told = [event["step"] for event in read_events(log) if event["t"] != "incident"]
    assert told == [1, 2, 3]


def test_what_is_left_at_the_end_is_an_error_unless_another_one_ends_the_block(log: Path) -> None:
    def write(error: type[BaseException] | None) -> None:
        with EventWriter(log, 0, hold=True) as events, full(events):
            events.emit("step", step=1)
            log.unlink()
            if error:
                raise error

    with pytest.raises(DiskRefused, match="No such file"):
        write(None)
    with pytest.raises(KeyError):
        write(KeyError)


def test_how_many_lines_are_lost_is_told_however_the_block_ends(log: Path) -> None:
    heard: list[Event] = []

    def write() -> EventWriter:
        events = EventWriter(log, 0, [heard.append], hold=True)
        events.emit("step", step=1)
        log.unlink()
        events.emit("step", step=2)
        events.emit("step", step=3)
        return events

    with pytest.raises(DiskRefused, match=r"No such file or directory; lines .* are lost: 3"), write():
        pass
    with pytest.raises(KeyError), write():
        raise KeyError
    lost = heard[-1]
    assert (lost["t"], lost["kind"]) == ("incident", "log lost")
    assert lost["error"].endswith("lines that waited for it are lost: 3")  # 2, that lines wait, 3
    assert "are lost: 3" in incidents.sentence(lost)


@pytest.mark.parametrize("hold", [True, False])
def test_what_is_recorded_is_on_the_disk_or_nowhere(hold: bool, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Event] = []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with EventWriter(log, 0, [heard.append], hold=hold) as events:
        events.record("run", step=0)
        before = log.read_bytes()
        with full(events), pytest.raises(DiskRefused, match="No space left"):
            events.record("run", step=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + 10, limits[1]))
        try:  # a part of the line fits
            with pytest.raises(DiskRefused, match="File too large"):
                events.record("run", step=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", broken)
            with pytest.raises(DiskRefused, match="Input/output error"):
                events.record("run", step=3)
        assert log.read_bytes() == before
        events.emit("step", step=4)
        events.record("run", step=4)
    assert [(event["t"], event["step"]) for event in heard] == [("run", 0), ("step", 4), ("run", 4)]
    assert list(read_events(log)) == heard


def test_what_is_recorded_comes_after_what_waits(log: Path) -> None:
    with EventWriter(log, 0, hold=True) as events:
        with full(events):
            events.emit("step", step=1)
            with pytest.raises(DiskRefused, match="No space left"):
                events.record("run", step=1)
        events.record("run", step=2)
    assert [(event["t"], event["step"]) for event in read_events(log)] == [("step", 1), ("incident", 1), ("run", 2)]


def test_a_log_that_cannot_be_opened_is_said(log: Path) -> None:
    log.mkdir()
    with pytest.raises(DiskRefused, match="Is a directory"):
        EventWriter(log, 0)


@pytest.mark.parametrize("hold", [True, False])
def test_a_log_that_was_deleted_is_not_written_into_the_void_nor_begun_anew(log: Path, hold: bool) -> None:
    with EventWriter(log, 0, hold=hold) as events:
        events.emit("step", step=1)
        saved = log.read_bytes()
        log.unlink()
        with nullcontext() if hold else pytest.raises(DiskRefused, match="No such file"):
            events.emit("step", step=2)
        assert not log.exists()
        log.write_bytes(saved)  # brought back
        events.emit("step", step=3)
    assert [event["step"] for event in read_events(log) if event["t"] == "step"] == [1, 2, 3]


@given(value=plain)
def test_readers_get_what_listeners_got(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    log = tmp_path_factory.mktemp("log") / "events.jsonl"
    heard: list[Event] = []
    with EventWriter(log, 0, [heard.append]) as events:
        returned = events.emit("probe", step=1, value=value)
    assert heard == [returned] == list(read_events(log))


def test_not_finite_numbers_are_strict_json_and_come_back(log: Path) -> None:
    with EventWriter(log, 0) as events:
        events.emit("step", step=1, loss=math.nan, grads=[math.inf, {"deep": -math.inf}])
    json.loads(log.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (event,) = read_events(log)
    assert math.isnan(event["loss"])
    assert event["grads"] == [math.inf, {"deep": -math.inf}]


def test_a_model_may_say_nan(log: Path) -> None:
    with EventWriter(log, 0) as events:
        events.emit("sample", step=1, prompt="inf", text="nan")
    (event,) = read_events(log)
    assert (event["prompt"], event["text"]) == ("inf", "nan")


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (torch.tensor(1.0), "torch.Tensor"),
        (np.float64(1.0), "numpy.float64"),
        (np.int64(1), "numpy.int64"),
        ((1, 2), "builtins.tuple"),
        (Path("x"), "Path"),
        ({1: 2}, "key 1"),
    ],
)
def test_what_is_not_plain_json_is_refused_by_place_and_nothing_is_written(log: Path, value: Any, named: str) -> None:
    with EventWriter(log, 0) as events, pytest.raises(TypeError, match=rf"event 'step', a, b\[1\].*{named}"):
        events.emit("step", step=1, a={"b": [0, value]})
    assert log.read_bytes() == b""


def test_unknown_types_and_reserved_fields_are_refused(log: Path) -> None:
    with EventWriter(log, 0) as events:
        with pytest.raises(ValueError, match=r"unknown event type 'ckpt'.*checkpoint"):
            events.emit("ckpt")
        with pytest.raises(ValueError, match="attempt cannot be a field"):
            events.emit("step", attempt=3)


def test_unknown_types_of_other_versions_are_read(log: Path) -> None:
    log.write_text('{"t":"later","v":9,"attempt":0}\n')
    assert [event["t"] for event in read_events(log)] == ["later"]


def test_a_log_torn_at_any_byte_gives_all_whole_events_before_and_all_after(log: Path) -> None:
    with EventWriter(log, 0) as events:
        for n in range(3):
            events.emit("step", step=n, word="é\n")
    whole = log.read_bytes()
    for cut in range(len(whole)):
        log.write_bytes(whole[:cut])
        # A line whose newline alone is missing is whole.
        kept = [0, 1, 2][: sum(line.endswith(b"}") for line in whole[:cut].split(b"\n"))]
        assert [event["step"] for event in read_events(log)] == kept
        with EventWriter(log, 1) as events:
            events.emit("run", step=0)
            events.emit("step", step=9)
        assert log.read_bytes().startswith(whole[:cut])
        assert [event["step"] for event in read_events(log)] == [*kept, 0, 9]


def test_damage_inside_an_attempt_is_an_error_with_its_line(log: Path) -> None:
    with EventWriter(log, 0) as events:
        for n in range(4):
            events.emit("step", step=n)
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*lines[:2], '{"t":"st\n', *lines[3:]]))
    with pytest.raises(UserError, match=r"events\.jsonl:3"):
        list(read_events(log))


def test_last_event(log: Path) -> None:
    assert last_event(log) is None
    with EventWriter(log, 4) as events:
        events.emit("step", step=1, loss=math.inf)
        events.emit("end", step=1, reason="done")
    whole = log.read_bytes()
    assert last_event(log) == {"t": "end", "v": 1, "attempt": 4, "step": 1, "reason": "done"}
    log.write_bytes(whole[:-5])
    assert last_event(log) == {"t": "step", "v": 1, "attempt": 4, "step": 1, "loss": math.inf}


def test_merged_drops_what_a_resume_undid_and_keeps_the_later_of_two_tellings() -> None:
    first = [step(0, n, loss=n) for n in (1, 2, 3, 4)]
    second = [resume(1, 2), step(1, 2, loss=2), step(1, 3, loss=30)]
    assert merged([*first, *second]) == [first[0], *second]


def test_merged_follows_a_resume_that_went_back_before_an_earlier_one() -> None:
    events = [step(0, 1), step(0, 2), step(0, 3), resume(1, 2), step(1, 3), resume(2, 1), step(2, 2)]
    assert merged(events) == [events[0], events[5], events[6]]


def test_merged_hides_no_incident() -> None:
    """A hang comes after the last checkpoint, so that the next attempt begins before it."""

    def hang(attempt: int, n: int) -> Event:
        return {"t": "incident", "v": 1, "attempt": attempt, "step": n, "kind": "hang"}

    events = [step(0, 1), step(0, 2), hang(0, 2), resume(1, 1), step(1, 2), hang(1, 2), resume(2, 1), step(2, 2)]
    assert merged(events) == [events[0], events[2], *events[5:]]


def test_merged_keeps_equal_types_of_one_attempt_and_events_without_a_step() -> None:
    note = {"t": "system", "v": 1, "attempt": 0}
    events = [note, step(0, 1, expert=1), step(0, 1, expert=2), resume(1, 1)]
    assert merged(iter(events)) == events


def test_events_and_runs_need_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import lumina.events, lumina.run.index, lumina.run.lock"
    subprocess.run([sys.executable, "-c", code], check=True)
