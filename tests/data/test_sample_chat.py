"""Conversations from docstrings, against pairs written by hand."""

from __future__ import annotations

import re
import subprocess
import sys
from textwrap import dedent

import pytest

from lumina.data.sample import sample_files
from lumina.data.sample_chat import LONGEST, LONGEST_QUESTION, MOST_ALIKE, SHORTEST, conversations


def asked(source: str, name: str = "shop.py") -> list[tuple[str, str]]:
    """Pairs of an indented source; the subject of a question stands between its fixed words."""
    return conversations(dedent(source), name)


def answers(source: str, name: str = "shop.py") -> list[str]:
    return [answer for _, answer in asked(source, name)]


def documented(docstring: str) -> str | None:
    """The answer to what a function with this docstring does."""
    told = conversations(f"def f(a):\n    {docstring!r}\n", "m.py")
    return told[0][1] if told else None


def told(signature: str) -> str:
    """The answer to which arguments a function with this signature takes."""
    return conversations(f"def f({signature}):\n    'Sell a thing.'\n", "m.py")[1][1]


def test_a_function_is_asked_what_it_does_and_takes() -> None:
    [(what, does), (which, takes)] = asked('''
        def copyfile(src, dst, *, follow_symlinks=True):
            """Copy data from src to dst

            More than anybody asks.
            """
    ''')
    assert "shop.copyfile(src, dst)" in what
    assert does == "Copy data from src to dst."
    assert "arguments" in which
    assert "shop.copyfile " in which
    assert takes == "It takes src, dst and follow_symlinks, which is True by default."


def test_phrasings_are_few_and_all_used() -> None:
    source = "".join(f"def f{i}():\n    'Serve customer {i}.'\n" for i in range(40))
    does = [question for question, answer in conversations(source, "m.py") if "Serve" in answer]
    assert len(does) == 40
    assert {re.sub(r"f\d+", "f", question) for question in does} == {
        "What does m.f() do?",
        "What is m.f() for?",
        "Explain m.f().",
    }


def test_methods_are_named_under_their_class_without_self() -> None:
    pairs = asked('''
        class Till:
            """A box for money."""
            def __init__(self, owner, float=0):
                """Not asked about."""
            async def pay(self, amount):
                """Put money in."""
            @classmethod
            def of(cls, owner):
                """A till for owner."""
            @staticmethod
            def count(coins):
                """The sum of the coins."""
            @property
            def total(self):
                """All the money inside."""
            @total.setter
            def total(self, value):
                """Never told."""
            def __len__(self):
                """A dunder is private."""
            def _open(self):
                """So is this."""
            class Drawer:
                """One part of a till."""
    ''')
    assert [answer for _, answer in pairs] == [
        "A box for money.",
        "It takes owner and float, which is 0 by default.",
        "Put money in.",
        "It takes amount.",
        "A till for owner.",
        "It takes owner.",
        "The sum of the coins.",
        "It takes coins.",
        "All the money inside.",
        "One part of a till.",
    ]
    subjects = [
        "class shop.Till",
        "shop.Till ",
        "shop.Till.pay(amount)",
        "shop.Till.pay ",
        "shop.Till.of(owner)",
        "shop.Till.of ",
        "shop.Till.count(coins)",
        "shop.Till.count ",
        "shop.Till.total",
        "class shop.Till.Drawer",
    ]
    for (question, _), subject in zip(pairs, subjects, strict=True):
        assert subject in question
    assert "total(" not in pairs[8][0]


@pytest.mark.parametrize(
    ("signature", "expected"),
    [
        ("", "It takes no arguments."),
        ("a", "It takes a."),
        ("a, /, b, *, c", "It takes a, b and c."),
        ("a=None", "It takes a, which is None by default."),
        ("a, b=1, *, c='x'", "It takes a, b (1 by default) and c ('x' by default)."),
        ("a, *args, **kw", "It takes a, any number of positional arguments and any keyword arguments."),
        ("*args, key=None", "It takes key (None by default) and any number of positional arguments."),
        ("**kw", "It takes any keyword arguments."),
        ("a, _cache={}", "It takes a."),
        ("a=configuration['a long way to the default']", "It takes a, which is optional."),
        ("a: int, b: str = ''", "It takes a and b, which is '' by default."),
    ],
)
def test_arguments(signature: str, expected: str) -> None:
    assert told(signature) == expected


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Sell one apple", "Sell one apple."),
        ("Sell one apple!", "Sell one apple."),
        ("sell one\n    apple.\n\n    Or two.", "Sell one apple."),
        ("Sell it (an apple.)", "Sell it (an apple)."),
        ("Return a name\nRaises KeyError for none.", "Return a name. Raises KeyError for none."),
        ("Sell one apple.\n>>> sell(1)\n1", "Sell one apple."),
        ("Sell one apple.\n.. versionadded:: 3.2", "Sell one apple."),
        ("Sell one apple.\n:param a: an apple", "Sell one apple."),
        ("Sell one apple.\nReturns:\n  the price", "Sell one apple."),
        ("Sell ``apple`` to :class:`~shop.Buyer` for `price`, *now*.", "Sell apple to shop.Buyer for price, now."),
        ("Call it with *args and **kwargs.", "Call it with *args and **kwargs."),
        ("f(a) -> int\n\nThe price of an apple.", "The price of an apple."),
        ("f(a) -> int. The price of an apple.", "The price of an apple."),
        ("f(a) -- the price of an apple", "The price of an apple."),
        ("Sell one apple. The kinds are:\n\n- red", "Sell one apple."),
        ("One of the following:\n\nred or green", None),
        ("Internal function.", None),
        ("Sell.", None),
        (">>> f(1)\n1", None),
        ("Args:\n    a: an apple", None),
        ("x" * LONGEST + " y", None),
        ("", None),
    ],
)
def test_docstring_to_answer(docstring: str, expected: str | None) -> None:
    assert documented(docstring) == expected


def test_a_long_paragraph_gives_the_sentences_that_fit() -> None:
    sentences = [f"Sentence {i} tells of {'apples and ' * 8}pears, e.g. Conference." for i in range(5)]
    answer = documented(" ".join(sentences))
    assert answer == " ".join(sentences[:2])


def test_no_docstring_no_conversation() -> None:
    assert asked("def f(a): return a\nclass C:\n    def g(self): pass") == []


def test_private_names_modules_and_inner_functions_are_left_out() -> None:
    source = "def f():\n    'Sell one apple.'\n    def g():\n        'Sell one pear.'\ndef _h():\n    'Sell a plum.'\n"
    assert answers(source) == ["Sell one apple.", "It takes no arguments."]
    for private in ("_shop.py", "shop/_stock.py", "shop/__main__.py", "lib-old/a.py"):
        assert asked(source, private) == []


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("os.py", "os"),
        ("json/__init__.py", "json"),
        ("asyncio/base_events.py", "asyncio.base_events"),
        ("_pydecimal.py", "decimal"),
    ],
)
def test_module_names(name: str, module: str) -> None:
    assert f" {module}.f(a)" in asked("def f(a):\n    'Sell one apple.'\n", name)[0][0]


def test_branches_are_read_and_no_question_comes_twice() -> None:
    pairs = asked('''
        try:
            def sell(a):
                """Sell in the first way."""
        except ImportError:
            def sell(a):
                """Sell in the second way."""
        if fast:
            def buy(b):
                """Buy something quickly."""
        else:
            def pack(c):
                """Pack it into paper."""
        if __name__ == "__main__":
            def main(d):
                """Only for the script."""
    ''')
    assert [a for _, a in pairs if "takes" not in a] == [
        "Sell in the first way.",
        "Buy something quickly.",
        "Pack it into paper.",
    ]
    assert len({question for question, _ in pairs}) == len(pairs)


def test_one_answer_is_given_only_a_few_times() -> None:
    told = answers("".join(f"def f{i}():\n    'Return the thing.'\n" for i in range(9)))
    assert told.count("Return the thing.") == told.count("It takes no arguments.") == MOST_ALIKE


def test_a_long_call_is_asked_about_by_name() -> None:
    arguments = ", ".join(f"argument_{i}" for i in range(20))
    question = asked(f"def f({arguments}):\n    'Sell one apple.'\n")[0][0]
    assert "shop.f" in question
    assert "(" not in question


@pytest.mark.parametrize("source", ["def f(:\n", "print 'old'\n", "a\0b", "(" * 300, "-" * 99999 + "1"])
def test_sources_that_do_not_parse_give_none(source: str) -> None:
    assert conversations(source, "m.py") == []


def test_invalid_escapes_do_not_warn() -> None:
    assert answers('def f():\n    "Split at \\d, a digit."\n')[0] == "Split at \\d, a digit."


def test_the_library_gives_thousands_the_same_in_every_process() -> None:
    files = sample_files()
    pairs = [pair for path, name in files for pair in conversations(path.read_text("utf-8", "replace"), name)]
    assert len(pairs) > 8000
    assert all(SHORTEST <= len(answer) <= LONGEST and answer.endswith(".") for _, answer in pairs)
    assert all(len(question) <= LONGEST_QUESTION and "\n" not in question + answer for question, answer in pairs)
    path, name = next(file for file in files if file[1] == "shutil.py")
    code = f"from lumina.data.sample_chat import *; print(conversations(open({str(path)!r}).read(), {name!r}))"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert fresh.strip() == repr(conversations(path.read_text(), name))
