"""How far something long has come: a plain callable that is handed down, so that no room knows who looks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
Tell = Callable[[str, int, int], None]  # what is being done, how much of it is done, and of how much


def silent(what: str, done: int, total: int) -> None:
    """Nobody looks."""


@contextmanager
def whole(what: str, progress: Tell) -> Iterator[None]:
    """Tells that something begins and that it is done, where nothing is known in between."""
    progress(what, 0, 1)
    yield
    progress(what, 1, 1)


def tracked(
    items: Iterable[T], what: str, total: int, progress: Tell, size: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """The items, telling after each how much of `total` is done, by `size`; all of it when they end."""
    done = 0
    progress(what, done, total)
    for item in items:
        yield item
        done += size(item)
        progress(what, min(done, total), total)
    progress(what, total, total)
