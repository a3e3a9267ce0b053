"""How near an answer is to a reference, counted in words."""

from __future__ import annotations

import re
import string
from collections import Counter

ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def token_f1(answer: str, reference: str) -> float:
    """F1 in [0, 1] of the bags of words of both texts, as in SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250).

    Case, ASCII punctuation and English articles do not count. Two texts without words agree (1); one without words
    has nothing in common with one that has some (0).
    """
    given, wanted = _words(answer), _words(reference)
    if not given or not wanted:
        return float(given == wanted)
    common = (given & wanted).total()
    return 2 * common / (given.total() + wanted.total())


def _words(text: str) -> Counter[str]:
    """The bag of words left after SQuAD's normalisation: punctuation is deleted, so `os.path` is one word."""
    return Counter(ARTICLES.sub(" ", text.lower().translate(WITHOUT_PUNCTUATION)).split())
