"""`lumina demo`: the whole path on embedded data, in about two minutes on two cores."""

from __future__ import annotations

from pathlib import Path

from lumina.cli.train import Fresh, Json, Quiet, Root, Voice, fit

PROMPT = "def read(self"
TOKENS = 120


def demo(fresh: Fresh = False, root: Root = Path("runs"), quiet: Quiet = False, json: Json = False) -> None:
    """Train a small hybrid and complete a prompt.

    The hybrid MoE + MoD is the debug preset; its text is Python's standard library.
    """
    from lumina.cli.generate import document, write
    from lumina.cli.output import print_json

    voice = Voice(quiet, json)
    run = fit("debug", [], root, fresh, voice)
    sampling = {"temperature": 0.8, "top_k": 0, "top_p": 0.9}
    if json:
        print_json({"t": "sample", **document(run, PROMPT, TOKENS, 0, sampling)}, indent=None)
    elif not quiet:
        voice.say(f"\nthe model continues {PROMPT!r}:\n")
        write(run, PROMPT, TOKENS, 0, sampling)
