"""Train, read what happened, and write text, in Python:

python examples/python_api.py my.txt
"""

from __future__ import annotations

import sys
from typing import Any

import lumina


def main(text: str, **keys: Any) -> None:
    """Trains on the file `text`; `keys` are dotted keys of the configuration."""
    keys = {"train.steps": 100, "train.eval_every": 20, **keys}
    # The same call again goes on with an unfinished run, and gives a finished one back at once.
    run = lumina.Trainer("debug", data=text, quiet=True, **keys).fit()

    # events.jsonl holds everything; `events()` is its one history, also after crashes and resumes.
    events = run.events()
    speed = {event["step"]: event["tok_s"] for event in events if event["t"] == "step"}
    print(f"{run.path}\n\n{'step':>6} {'bits per byte':>14} {'tokens/s':>10}")
    for event in events:
        if event["t"] == "eval":
            print(f"{event['step']:>6} {event['bpb']:>14.3f} {speed[event['step']]:>10,.0f}")

    # The newest complete checkpoint; also while the run trains.
    print("\n" + lumina.load(run).generate("The", max_tokens=60, temperature=0.8, seed=0))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        main(sys.argv[1])
    except lumina.UserError as error:  # what is wrong, where, and what to do
        sys.exit(f"error: {error}")
