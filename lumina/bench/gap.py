"""What looking ahead is worth: held-out loss of a run under training's choice of tokens and under both causal rules."""

from __future__ import annotations

from lumina.config.resolve import read
from lumina.data.loader import Heldout
from lumina.errors import UserError
from lumina.inference.engine import load
from lumina.run.folder import Run
from lumina.training import setup
from lumina.training.evaluate import Realised, routing_gap
from lumina.training.precision import Precision

HEADER = ("tokens are chosen by", "nats a token", "gap", "realised capacity, mean", "p99", "agrees with the top C")


def measure(run: Run) -> tuple[int, dict[str, Realised]]:
    """The step of the newest checkpoint, and its loss under each choice, in fp32 over all held-out tokens.

    Raises `UserError` if the run's model does not learn to choose tokens.
    """
    config = read(run.config).config
    if config.model.mod is None:
        raise UserError(
            f"{run.path}: a {config.model.kind} model chooses no tokens", fix="take a run of kind mod or hybrid"
        )
    if config.model.mod.routing != "learned":
        raise UserError(
            f"{run.path}: with model.mod.routing={config.model.mod.routing} nothing looks ahead",
            fix="take a run of model.mod.routing=learned",
        )
    model = load(run)
    corpus = setup.load_data(config, tokenizer=str(run.tokenizer))
    text = Heldout(corpus.of("heldout", "text"), config.model.seq_len, 1, corpus.tokenizer.end_id)
    return model.step, routing_gap(model.transformer, text, Precision("fp32", "fp32", "cpu"))


def rows(found: dict[str, Realised]) -> list[list[str]]:
    """One row a choice, for `HEADER`."""
    top = found["top"].loss
    return [
        [rule, f"{one.loss:.4f}", f"{one.loss / top - 1:+.2%}", f"{one.mean:.4f}", f"{one.p99:.4f}", f"{one.agree:.1%}"]
        for rule, one in found.items()
    ]
