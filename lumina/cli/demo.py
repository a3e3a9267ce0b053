"""`lumina demo`: the whole path on embedded data, in some minutes on two cores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lumina.cli.train import Fresh, Json, Quiet, Root, Voice, fit

if TYPE_CHECKING:
    from lumina.run.folder import Run

SETTINGS = ["data.train=[sample, sample_chat]", "data.mode=hybrid_interleaved", "data.base_ratio=0.8"]
QUESTION = "What does shutil.copyfile(src, dst) do?"
PROMPT = "def read(self"
TOKENS = 80


def demo(fresh: Fresh = False, root: Root = Path("runs"), quiet: Quiet = False, json: Json = False) -> None:
    """Train a small hybrid, complete a prompt and answer a question.

    The hybrid MoE + MoD is the debug preset; it reads the sources of Python's standard library, and questions and
    answers about its functions.
    """
    from lumina.cli.generate import document, write
    from lumina.cli.output import print_json, print_piece

    voice = Voice(quiet, json)
    run = fit("debug", SETTINGS, root, fresh, voice)
    sampling = {"temperature": 0.8, "top_k": 0, "top_p": 0.9}
    if json:
        print_json({"t": "sample", **document(run, PROMPT, TOKENS, 0, sampling)}, indent=None)
        print_json({"t": "sample", "prompt": QUESTION, "text": answer(run, QUESTION, lambda piece: None)}, indent=None)
    elif not quiet:
        voice.say(f"\nthe model continues {PROMPT!r}:\n")
        write(run, PROMPT, TOKENS, 0, sampling)
        voice.say(f"\nasked {QUESTION!r}, it answers:\n")
        answer(run, QUESTION, print_piece)
        print_piece("\n")


def answer(run: Run, question: str, write: Callable[[str], object]) -> str:
    """What the model says to a question, the likeliest token each time."""
    from lumina.inference.conversation import Conversation
    from lumina.inference.engine import load
    from lumina.inference.sampler import Sampler

    return Conversation(load(run), Sampler(temperature=0), TOKENS, seed=0).answer(question, write).text
