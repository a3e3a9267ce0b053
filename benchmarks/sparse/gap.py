"""What looking ahead is worth: held-out loss under training's choice of tokens and under both causal rules.

    lumina train debug train.steps=2000
    python benchmarks/sparse/gap.py runs/debug-…

Prints Markdown: nats a token, the gap to training's choice, and the realised capacity over sequences and blocks.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lumina
from lumina.config.resolve import read
from lumina.data.loader import Heldout
from lumina.training import setup
from lumina.training.evaluate import routing_gap
from lumina.training.precision import Precision


def main(path: str) -> None:
    run = lumina.Run.open(Path(path))
    model, config = lumina.load(run), read(run.config).config
    corpus = setup.load_data(config, tokenizer=str(run.tokenizer))
    text = Heldout(corpus.heldout, config.model.seq_len, 8, corpus.tokenizer.end_id)
    found = routing_gap(model.transformer, text, Precision("fp32", "fp32", "cpu"))
    top = found["top"].loss
    print(f"{run.path.name}, step {model.step}, {config.model.kind}, capacity {config.model.mod.capacity}, in fp32\n")  # type: ignore[union-attr]
    print("| tokens are chosen by | loss | gap | realised capacity, mean | p99 |\n| --- | ---: | ---: | ---: | ---: |")
    for rule, one in found.items():
        print(f"| {rule} | {one.loss:.4f} | {one.loss / top - 1:+.2%} | {one.mean:.4f} | {one.p99:.4f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
