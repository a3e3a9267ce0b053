"""Every test runs on one thread, on its own cache, and away from the user's folders."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("any machine", deadline=None)  # time is never asserted
settings.load_profile("any machine")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start: more would spin on busy cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["LUMINA_CACHE"] = str(tmp_path_factory.mktemp("cache"))
