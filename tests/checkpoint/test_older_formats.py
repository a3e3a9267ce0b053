"""Runs of earlier versions open in this one: listed, verified, loaded, written with, and gone on with.

`format-N/` holds a text, a run on it that a program of format N was interrupted in at step 3, and in
`uninterrupted.jsonl` the events of the whole run as that program told them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from lumina.checkpoint import catalogue, retention, store
from lumina.checkpoint.migrations import FORMAT, MIGRATIONS
from lumina.checkpoint.readback import fingerprint
from lumina.cli import main
from lumina.events import Event, read_events
from lumina.run.folder import Run
from lumina.training.trainer import resume

HERE = Path(__file__).parent
FORMATS = range(1, FORMAT)


@pytest.fixture(params=FORMATS)
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    shutil.copytree(HERE / f"format-{request.param}", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Run(Path("run"))


def test_every_format_has_its_migration_and_its_run() -> None:
    assert sorted(MIGRATIONS) == list(FORMATS)
    assert sorted(path.name for path in HERE.glob("format-*")) == [f"format-{n}" for n in FORMATS]


def test_it_verifies_is_listed_and_writes(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = store.checkpoints(run.checkpoints)
    assert store.verify(path) == []
    assert catalogue.sizes(path) is not None
    assert retention.kept(run.checkpoints, keep_last=1) == {path: ["newest"]}
    assert main(["generate", "run", "-p", "line", "--max-tokens", "3"]) == 0
    assert "step 3 of run" in capsys.readouterr().err


def by_step(events: Iterable[Event]) -> dict[tuple[str, int], Event]:
    return {(event["t"], event["step"]): event for event in events if event["t"] in ("step", "eval")}


def test_it_is_gone_on_with_to_the_same_end(run: Run) -> None:
    """As far as another CPU rounds alike: state that was lost or taken for another moves the third digit."""
    told = by_step(read_events(Path("uninterrupted.jsonl")))
    resume(run)
    again = by_step(run.events())
    assert again.keys() == told.keys()
    for key, event in told.items():
        for what in event.keys() & {"loss", "grad_norm", "bal", "lr", "tokens"}:
            assert again[key][what] == pytest.approx(event[what], rel=1e-4), (key, what)


def test_it_has_the_values_that_are_saved_today(run: Run) -> None:
    """A layout of `state.json` that changes without a migration breaks this."""
    (old,) = store.checkpoints(run.checkpoints)
    migrated = store.read(old).state
    resume(run)
    new = (run.checkpoints / "latest").resolve()
    assert json.loads((new / store.COMPLETE).read_bytes())["format"] == FORMAT

    def names(values: dict[str, object]) -> set[str]:
        # What the orchestrator packs is its own to read.
        inner = {key: value for key, value in values.items() if isinstance(value, dict) and key != "orchestrator"}
        return set(values) | {f"{key}.{name}" for key, value in inner.items() for name in value}

    assert names(migrated) == names(store.read(new).state)


def test_one_that_cannot_be_brought_up_to_date_is_passed_over(run: Run) -> None:
    """Sealed as it should be, but without what every run of its format had; an older one is tried."""
    (old,) = store.checkpoints(run.checkpoints)
    bad = store.folder(run.checkpoints, 4)
    shutil.copytree(old, bad)
    seal, state = json.loads((bad / store.COMPLETE).read_text()), json.loads((bad / store.STATE).read_text())
    del state["progress"]
    (bad / store.STATE).write_text(json.dumps(state))
    (hash,) = seal["files"][store.STATE].keys() - {"size"}
    size, digest = fingerprint(bad / store.STATE, hash)
    seal |= {"step": 4, "files": seal["files"] | {store.STATE: {"size": size, hash: digest}}}
    (bad / store.COMPLETE).write_text(json.dumps(seal))
    found, skipped = store.newest(run.checkpoints)
    assert found is not None
    assert found.path == old
    assert skipped == [(bad, "state.json cannot be read: KeyError('progress')")]
