"""Which text is held out: whole families, chosen by hash, or the ends of the documents if those are few."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from lumina.data.documents import Document

RULE = 1  # raise it when the split of some corpus changes
SHARE = 0.03  # of the bytes that families hold out
MOST = 0.05  # no family may bring the share above this
TAIL = 0.05  # of each document, if no families make up at least half of SHARE

Rule = Literal["families", "tails"]


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document], Rule]:
    """Training side, held-out side and the rule that fitted. Under "families" no family is on both sides.

    Files may move, be renamed or come in another order: the same texts are always split the same way.
    """
    families: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        families[document.family].append(document)
    sizes = {family: sum(_bytes(member) for member in members) for family, members in families.items()}
    total, held = sum(sizes.values()), 0
    chosen: set[str] = set()
    for family in sorted(families):
        if held >= SHARE * total:
            break
        if held + sizes[family] <= MOST * total:
            chosen.add(family)
            held += sizes[family]
    if held < SHARE / 2 * total:
        return *_tails(documents), "tails"
    train = [document for document in documents if document.family not in chosen]
    return train, [document for document in documents if document.family in chosen], "families"


def _tails(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    cuts = [_cut(document.text) for document in documents]
    heads = [replace(d, text=d.text[:cut]) for d, cut in zip(documents, cuts, strict=True)]
    tails = [replace(d, text=d.text[cut:]) for d, cut in zip(documents, cuts, strict=True)]
    return [head for head in heads if head.text], [tail for tail in tails if tail.text]


def _cut(text: str) -> int:
    """Where the tail begins: after a line if one ends nearby, else after a word, else anywhere."""
    nearby, cut = int(len(text) * (1 - 2 * TAIL)), int(len(text) * (1 - TAIL))
    for mark in "\n ":
        border = text.rfind(mark, nearby, cut) + 1
        if border:
            return border
    return cut


def _bytes(document: Document) -> int:
    return len(document.text.encode())
