"""Whatever may take long tells how far it is: from nothing, forwards, to all of it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
from support import settings

from lumina.progress import tracked
from lumina.training.trainer import Trainer, resume


def test_preparing_evaluating_timing_and_verifying_tell_how_far_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUMINA_CACHE", str(tmp_path / "cache"))  # nothing is prepared yet
    told: dict[str, list[tuple[int, int]]] = defaultdict(list)

    def tell(what: str, done: int, total: int) -> None:
        told[what].append((done, total))

    keys = settings(tmp_path) | {"train.eval_every": 2}
    run = Trainer("tiny", root=tmp_path / "runs", progress=tell, **keys).fit()
    run.event_log.write_text("\n".join(run.event_log.read_text().splitlines()[:-1]) + "\n")  # as if it were not done
    resume(run, progress=tell)
    assert {name.split()[0] for name in told} == {
        "hashing",
        "reading",
        "training",
        "encoding",
        "evaluating",
        "verifying",
        "building",
        "rehearsing",
        "the",  # first step
        "saving",
    }
    for what, calls in told.items():
        calls = [call for call in calls if call[1]]  # an empty side has nothing to tell
        starts = [i for i, (done, _) in enumerate(calls) if done == 0]
        assert starts, what
        for start, end in zip(starts, [*starts[1:], len(calls)], strict=True):
            one = calls[start:end]
            assert one == sorted(one), what
            assert one[-1][0] == one[-1][1], what


def test_tracked_passes_items_through_and_never_tells_more_than_all() -> None:
    calls: list[tuple[str, int, int]] = []
    assert list(tracked("abc", "letters", 2, lambda *call: calls.append(call))) == ["a", "b", "c"]
    assert calls == [("letters", 0, 2), ("letters", 1, 2), ("letters", 2, 2), ("letters", 2, 2), ("letters", 2, 2)]
