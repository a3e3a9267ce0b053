"""Draws what the routers of a run did: two SVG files that any browser opens.

    python examples/routing_figures.py runs/debug-… figures/ "def read(self):"

load.svg    the load of every expert over the training, from the run's `moe` events
depth.svg   which blocks compute which tokens of a text, as the newest checkpoint would while writing
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch

import lumina

LIGHT, DARK, GAP = (237, 244, 250), (8, 48, 107), 3
CELL, MARGIN, FONT = 16, 70, 'font-family="sans-serif" font-size="11"'


def load_map(run: lumina.Run) -> str:
    """A row for each expert of each layer, a column for each event; white is no load, dark is twice the mean."""
    events = [event for event in run.events() if event["t"] == "moe"]
    if not events:
        sys.exit(f"{run.path}: has no `moe` event (is it a model with experts, and has it ten steps?)")
    rows, labels = [], []
    for layer, first in enumerate(events[0]["load"]):
        for expert in range(len(first)):
            rows.append([event["load"][layer][expert] / 2 for event in events])
            labels.append(f"layer {layer + 1}" if expert == 0 else "")
    steps = [event["step"] for event in events]
    every = max(1, len(steps) // 8)
    below = [str(step) if i % every == 0 else "" for i, step in enumerate(steps)]
    return picture("Load of each expert over the training (step below; dark is twice the mean)", rows, labels, below, 6)


def depth_map(run: lumina.Run, text: str) -> str:
    """A row for each block, a column for each token; dark where the block computes it."""
    model = lumina.load(run)
    ids = torch.tensor([[model.tokenizer.end_id, *model.tokenizer.encode(text)]])
    if ids.shape[1] > model.transformer.config.seq_len:
        sys.exit("the text is longer than the model's context")
    taken: dict[int, list[float]] = {}
    with torch.no_grad():
        x = model.transformer.embed(ids)
        for number, block in enumerate(model.transformer.units):
            positions = torch.arange(ids.shape[1]).unsqueeze(0)
            keep = block.router(x, positions)[0][0] if block.router else torch.ones(ids.shape[1])
            taken[number] = keep.float().tolist()
            rope = model.transformer._rope(positions)
            mask = (positions.unsqueeze(2) >= positions.unsqueeze(1)).unsqueeze(1)
            x, _ = block.decode(x, positions, rope, mask, None)
    tokens = ["·", *(model.tokenizer.decode([i]) for i in ids[0, 1:].tolist())]
    labels = [f"block {number + 1}" for number in taken]
    return picture("Tokens that each block computes; the others are copied", list(taken.values()), labels, tokens, CELL)


def picture(title: str, rows: Sequence[Sequence[float]], labels: Sequence[str], below: Sequence[str], size: int) -> str:
    """A heat map of values from 0 (white) to 1 (dark) as SVG."""
    width = max(6, min(CELL, 900 // max(1, len(below))))
    tops, top = [], 30
    for i, label in enumerate(labels):
        top += GAP if i and label else 0  # a little air between layers
        tops.append(top)
        top += size
    right, bottom = MARGIN + width * len(below) + 20, top
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{max(right, 480)}" height="{bottom + 90}" {FONT}>',
        f'<rect width="100%" height="100%" fill="white"/><text x="8" y="18">{escape(title)}</text>',
    ]
    for y, row, label in zip(tops, rows, labels, strict=True):
        parts.append(f'<text x="{MARGIN - 6}" y="{y + 11}" text-anchor="end">{escape(label)}</text>')
        for x, value in enumerate(row):
            share = min(1.0, max(0.0, value))
            colour = ",".join(str(round(a + share * (b - a))) for a, b in zip(LIGHT, DARK, strict=True))
            place = f'x="{MARGIN + width * x}" y="{y}" width="{width}" height="{size}"'
            parts.append(f'<rect {place} fill="rgb({colour})" stroke="#fff" stroke-width="0.5"/>')
    for x, label in enumerate(below):
        left, top = MARGIN + width * x + width / 2 + 3, bottom + 6
        shown = escape(re.sub(r" {3,}", "␣…", label.replace("\n", "↵")).replace(" ", "␣"))
        parts.append(
            f'<text x="{left}" y="{top}" text-anchor="end" transform="rotate(-60 {left} {top})">{shown}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit('usage: python examples/routing_figures.py RUN FOLDER "some text"')
    run, folder = lumina.Run.open(Path(sys.argv[1])), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "load.svg").write_text(load_map(run), encoding="utf-8")
    (folder / "depth.svg").write_text(depth_map(run, sys.argv[3]), encoding="utf-8")
    print(f"wrote {folder / 'load.svg'} and {folder / 'depth.svg'}")


if __name__ == "__main__":
    main()
