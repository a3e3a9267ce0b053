"""A table of run folders side by side, in Markdown, as a pull request wants it:

    python examples/compare_runs.py BEFORE AFTER …

Nothing is needed but the folders: it shows how to read events.jsonl with Python's standard library alone.
Speed is the median over the steps after the first fifth, of which at most ten are left out.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

WARM_UP = 10  # steps in which caches fill


def read(run: Path) -> dict[str, list[dict[str, Any]]]:
    """The events of a run by type. A step that was repeated after a crash counts once, as it was last told."""
    told: dict[tuple[str, int], dict[str, Any]] = {}
    log = run / "events.jsonl"
    if not log.is_file():
        sys.exit(f"{run}: not a run folder: it has no events.jsonl")
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # a killed process can tear its last line
            continue
        told[event["t"], event.get("step", 0)] = event
    return {kind: [event for event in told.values() if event["t"] == kind] for kind in ("run", "step", "eval")}


def column(run: Path) -> dict[str, str]:
    """What the table says of a run."""
    events = read(run)
    if not events["step"]:
        sys.exit(f"{run}: has no step yet")
    begun, steps = events["run"][0], sorted(events["step"], key=lambda event: event["step"])
    measured = steps[min(WARM_UP, len(steps) // 5) :]
    speed = statistics.median(event["tok_s"] for event in measured)
    final = max(events["eval"], key=lambda event: event["step"], default=None)
    return {
        "kind, parameters (active)": f"{begun['kind']}, {begun['params'] / 1e6:.2f}M ({begun['active'] / 1e6:.2f}M)",
        "device, precision": f"{begun['device']}, {begun['precision']}",
        "steps · tokens": f"{steps[-1]['step']:,} · {steps[-1]['tokens']:,}",
        "throughput, tokens/s (median)": f"{speed:,.0f}",
        "step, ms (median)": f"{1000 * begun['batch_tokens'] / speed:.0f}",
        "MFU, % (median)": f"{100 * statistics.median(event['mfu'] for event in measured):.1f}",
        "memory, GiB (largest)": f"{max(event['mem'] for event in steps) / 2**30:.2f}",
        "seconds per epoch": f"{begun['data']['tokens']['train'] / speed:.1f}",
        "training loss, last step": f"{float(steps[-1]['loss']):.4f}",
        "held-out loss": f"{float(final['loss']):.4f} at step {final['step']}" if final else "",
        "held-out bits per byte": f"{float(final['bpb']):.4f} at step {final['step']}" if final else "",
    }


def main(*runs: str) -> None:
    columns = [column(Path(run)) for run in runs]
    print("| | " + " | ".join(Path(run).name for run in runs) + " |")
    print("|---" * (len(runs) + 1) + "|")
    for row in columns[0]:
        print(f"| {row} | " + " | ".join(values[row] for values in columns) + " |")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
