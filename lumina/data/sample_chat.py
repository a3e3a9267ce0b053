"""Questions and answers about Python's standard library, made from the docstrings and signatures of its sources.

A small model (5M parameters, 256 tokens of context) learns to chat from them: the questions keep to a few phrasings,
the answers to the start of a docstring. Nothing is random: the phrasing follows from the name asked about, so the same
Python gives the same conversations on every machine.
"""

from __future__ import annotations

import ast
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

SHORTEST, LONGEST = 10, 300  # characters of an answer
LONGEST_QUESTION = 120  # characters; a longer call is asked about by its name alone
LONGEST_DEFAULT = 24  # characters of a default value worth telling
# How often one file may give the same answer ("It takes no arguments." fits a third of all methods).
MOST_ALIKE = 2

FUNCTION_QUESTIONS = ("What does {} do?", "What is {} for?", "Explain {}.")
CLASS_QUESTIONS = ("What is the class {} for?", "What is the class {}?", "Explain the class {}.")
PROPERTY_QUESTIONS = ("What is {}?", "What does {} hold?")
ARGUMENT_QUESTIONS = ("What arguments does {} take?", "Which arguments does {} take?")

Function = ast.FunctionDef | ast.AsyncFunctionDef
# Their decorated function is an attribute, asked about without a call.
PROPERTIES = {"property", "cached_property", "abstractproperty"}
# A second body under a name that another function already has.
SECOND_BODIES = {"setter", "deleter", "getter", "overload", "register"}


@dataclass(frozen=True)
class Definition:
    """A public function, method or class under its full dotted name."""

    name: str
    node: Function | ast.ClassDef
    is_method: bool = False


def conversations(text: str, name: str) -> list[tuple[str, str]]:
    """Question and answer pairs about the public names of one source file, in the order of the file.

    `name` is the file's path relative to the library, such as `asyncio/base_events.py`. No question occurs twice.
    Private modules and files that do not parse give none.
    """
    module, tree = _module_name(name), _parse(text)
    if module is None or tree is None:
        return []
    chosen: dict[str, str] = {}
    alike: Counter[str] = Counter()
    for definition in _definitions(tree.body, module):
        for question, answer in _pairs(definition):
            if question not in chosen and alike[answer] < MOST_ALIKE:
                chosen[question] = answer
                alike[answer] += 1
    return list(chosen.items())


def _module_name(name: str) -> str | None:
    """The dotted name users import, or `None` for a private module.

    `_pydecimal.py` and its like are the Python twins of C modules: their names are public without `_py`.
    """
    parts = name.removesuffix(".py").split("/")
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    parts[0] = parts[0].removeprefix("_py")
    return ".".join(parts) if all(part.isidentifier() and not part.startswith("_") for part in parts) else None


def _parse(text: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old sources
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two from deep nesting
            return None


def _definitions(body: list[ast.stmt], owner: str, in_class: bool = False) -> Iterator[Definition]:
    """Public definitions of a module's or class's body, also those under `if` and `try`; not those in functions."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef):
            if node.name.startswith("_"):
                continue
            full = f"{owner}.{node.name}"
            yield Definition(full, node, in_class)
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node.body, full, in_class=True)
        elif isinstance(node, ast.If | ast.Try) and not _is_script(node):
            handlers = [handler.body for handler in node.handlers] if isinstance(node, ast.Try) else []
            for part in (node.body, *handlers, node.orelse):
                yield from _definitions(part, owner, in_class)


def _is_script(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).startswith("__name__ ==")


def _pairs(definition: Definition) -> Iterator[tuple[str, str]]:
    """What it does, and which arguments it takes. Names without a docstring are left out."""
    node, name = definition.node, definition.name
    answer = _summary(ast.get_docstring(node) or "")
    if answer is None:
        return
    if isinstance(node, ast.ClassDef):
        yield _phrased(CLASS_QUESTIONS, name, name), answer
        initialiser = next((item for item in node.body if isinstance(item, Function) and item.name == "__init__"), None)
        arguments = initialiser and _Arguments.of(initialiser, bound=True)
    else:
        decorators = {_last_name(decorator) for decorator in node.decorator_list}
        if decorators & SECOND_BODIES:
            return
        if decorators & PROPERTIES:
            yield _phrased(PROPERTY_QUESTIONS, name, name), answer
            return
        arguments = _Arguments.of(node, bound=definition.is_method and "staticmethod" not in decorators)
        call = f"{name}({', '.join(arguments.required)})"
        yield _phrased(FUNCTION_QUESTIONS, name, call), answer
    if arguments and len(told := arguments.told()) <= LONGEST:
        yield _phrased(ARGUMENT_QUESTIONS, name, name), told


def _last_name(decorator: ast.expr) -> str:
    """`cached_property` of `@functools.cached_property`, `setter` of `@x.setter`, also when called."""
    if isinstance(decorator, ast.Call):
        decorator = decorator.func
    return ast.unparse(decorator).rpartition(".")[2]


def _phrased(phrasings: tuple[str, ...], name: str, subject: str) -> str:
    """One of the phrasings, the same for a name on every machine (`hash` is salted, a checksum is not)."""
    phrasing = phrasings[zlib.crc32(name.encode()) % len(phrasings)]
    question = phrasing.format(subject)
    return question if len(question) <= LONGEST_QUESTION else phrasing.format(name)


@dataclass(frozen=True)
class _Arguments:
    """A signature as told to a user: required names, optional names with their default value, and the open ends."""

    required: list[str]
    optional: list[tuple[str, str]]
    open_ends: list[str]

    @staticmethod
    def of(node: Function, bound: bool) -> _Arguments:
        """Read from the source; `bound` leaves out the first (`self` or `cls`), and private options never show."""
        spec = node.args
        positional = [*spec.posonlyargs, *spec.args]
        missing = [None] * (len(positional) - len(spec.defaults))
        valued = list(zip(positional, [*missing, *spec.defaults], strict=True))[int(bound) :]
        valued += zip(spec.kwonlyargs, spec.kw_defaults, strict=True)
        required = [argument.arg for argument, value in valued if value is None]
        optional = [
            (argument.arg, ast.unparse(value))
            for argument, value in valued
            if value is not None and not argument.arg.startswith("_")
        ]
        open_ends = ["any number of positional arguments"] if spec.vararg else []
        if spec.kwarg:
            open_ends.append("any keyword arguments")
        return _Arguments(required, optional, open_ends)

    def told(self) -> str:
        """A sentence: `It takes src, dst and follow_symlinks, which is True by default.`"""
        if not (self.required or self.optional or self.open_ends):
            return "It takes no arguments."
        if len(self.optional) == 1 and not self.open_ends:
            [(name, value)] = self.optional
            known = f"which is {value} by default" if len(value) <= LONGEST_DEFAULT else "which is optional"
            return f"It takes {_listed([*self.required, name])}, {known}."
        options = [
            f"{name} ({value} by default)" if len(value) <= LONGEST_DEFAULT else f"{name} (optional)"
            for name, value in self.optional
        ]
        return f"It takes {_listed([*self.required, *options, *self.open_ends])}."


def _listed(items: list[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


# ---------------------------------------------------------------------------------------------------------------------
# Docstrings to answers

# Lines that end the prose: a doctest, a directive, a field, a list, a heading's rule, a table.
NOT_PROSE = re.compile(r">>>|\.\. |:\w[^:`]*:(\s|$)|[-*+o•] |\d+[.)] |[-=~^*_#+|]{3,}|@\w|\$ ")
SECTION = re.compile(r"(args?|arguments?|parameters?|params|returns?|raises|examples?|notes?|usage|keywords?):", re.I)
# At the start of a docstring: `copy(x) -- ` or `tell() -> int. ` repeats the signature, `(pid, fd) ` tells the result.
SIGNATURE = re.compile(r"^[\w.]+\([^()]*\)\s*(((->|=>)\s*([a-z]\w*[.,]\s+)?|--|-|:)\s*|$)|^\([^()]*\)\s+|^\+\s+")
# Says nothing about what the thing does.
EMPTY = re.compile(
    r"internal|undocumented|deprecated|provisional|see[ :]|xxx|todo|override|ditto|same as above|'forward'|\(", re.I
)
# A call's form or a debugger command (`b(reak) [line]`), not prose.
CODE = re.compile(r"->|\[,|\w=\w+,|<instance>|\w\(\w+\) = |^\w+\([a-z]|\w = \w+\(")
SENTENCE = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<! vs\.)\s+(?=[A-Z\"'(])")
# An early line end before a capital is a sentence without its full stop; a wrapped line is longer.
WRAPPED = 55
MARKUP = (
    (re.compile(r":[\w:+-]+:`[~!]?([^`<]+?)(\s*<[^`]*>)?`"), r"\1"),  # :class:`~name`, :ref:`text <label>`
    (re.compile(r"`([^`<]+?)\s*<[^`]*>`__?"), r"\1"),  # `text <address>`_
    (re.compile(r"``([^`]+)``"), r"\1"),
    (re.compile(r"`([^'`\s]+)'"), r"\1"),  # `old quotes'
    (re.compile(r"`([^`]+)`"), r"\1"),
    (re.compile(r"(?<![\w*])\*\*?([A-Za-z][\w ]*)\*\*?(?![\w*])"), r"\1"),  # *emphasis*
    (re.compile(r"\|(\w+)\|"), r"\1"),
)


def _summary(docstring: str) -> str | None:
    """The first paragraph that says something, on one line and ending in a full stop, or `None`.

    A paragraph beyond `LONGEST` gives its first sentences only.
    """
    for paragraph in docstring.split("\n\n"):
        if SECTION.match(paragraph.strip()) or NOT_PROSE.match(paragraph.strip()):
            return None  # what follows explains details
        answer = _shortened(_plain(_prose(paragraph)))
        if _says_something(answer):
            return answer
        if not answer and paragraph.endswith(":"):
            return None  # what follows is its list
    return None


def _says_something(answer: str) -> bool:
    """Neither too short, nor a phrase that fits everything, nor a formula, table or call."""
    letters = sum(character.isalpha() or character == " " for character in answer)
    told = len(answer) >= SHORTEST and " " in answer and letters >= 0.8 * len(answer)
    return told and not EMPTY.match(answer) and not CODE.search(answer)


def _prose(paragraph: str) -> str:
    """The lines before the first that is no prose, joined; without a signature in front."""
    joined = ""
    last = ""
    for line in (line.strip() for line in paragraph.splitlines()):
        if joined and (NOT_PROSE.match(line) or SECTION.match(line)):
            break
        if last and len(last) < WRAPPED and last[-1].isalnum() and line[:1].isupper():
            joined += "."
        joined, last = f"{joined} {line}".strip(), line
        if SIGNATURE.fullmatch(joined):
            joined, last = "", ""
    return SIGNATURE.sub("", joined)


def _plain(text: str) -> str:
    """Without markup and runs of spaces, first letter large unless the first word is a name from code."""
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    text = " ".join(text.split())
    first = text.split(" ", 1)[0]
    return text[:1].upper() + text[1:] if first.isalpha() and first.islower() else text


def _shortened(text: str) -> str:
    """As many sentences as `LONGEST` allows, the last one closed by a full stop; empty if not one fits.

    A sentence that ends in a colon introduces something that is not there, so it goes.
    """
    kept = ""
    for sentence in SENTENCE.split(text):
        longer = f"{kept} {sentence}".strip()
        if sentence.endswith(":") or len(_closed(longer)) > LONGEST:
            break
        kept = longer
    return _closed(kept) if kept else ""


def _closed(text: str) -> str:
    """Ending in one full stop, which stands behind a bracket or quote."""
    inner = text.rstrip(" .!?;,:-")
    if text.endswith((".)", '."', ".'")):
        inner = f"{text[:-2]}{text[-1]}"
    return f"{inner}." if inner else ""
