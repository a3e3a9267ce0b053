"""A worker of `lumina verify resume` in whose runs resuming is broken, as its first argument says."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

from lumina.checkpoint import store
from lumina.training import saving
from lumina.training.state import State
from lumina.verify import worker

unpack = State.unpack


def unpack_without_optimizer_steps(self: State, state: dict[str, Any]) -> None:
    unpack(self, state)
    self.optimizer.steps_taken = 0


def last_but_one(*arguments: Any) -> Any:
    found, skipped = store.newest(*arguments)
    older = store.checkpoints(found.path.parent)[1:] if found else []
    return (store.read(older[0]) if older else found), skipped


what = sys.argv[1]
if what == "loses the optimizer's steps":
    State.unpack = unpack_without_optimizer_steps
elif what == "begins with the last checkpoint but one":
    saving.store = SimpleNamespace(**vars(store) | {"newest": last_but_one})  # where runs look, not the verifier
else:
    raise ValueError(what)
worker.main()
