"""Planned against actual: `lumina plan … --measure`, then the run itself, timed from outside.

    python3 benchmarks/planner/total_time.py [NAME …]     # appends to total_time.jsonl, one line a run

Planned is what the plan says in total, from the start of the process to its end; actual is what the clock says of
`lumina train` with the same settings in a process of its own, its data prepared before, as by then it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ONE = "parallel.threads=1"
RUNS = {
    "tiny dense": ["tiny", "model.kind=dense", "train.steps=2500", "train.eval_every=500", "checkpoint.every=500"],
    "tiny hybrid, AdamW": ["tiny", "train.optimizer=adamw", "train.steps=1200", "checkpoint.every=400"],
    "debug moe": ["debug", "model.kind=moe", "train.steps=50", "train.eval_every=25", "checkpoint.every=25", ONE],
    "debug mod": ["debug", "model.kind=mod", "train.steps=70", "train.eval_every=35", "checkpoint.every=35", ONE],
    "debug hybrid": ["debug", "train.steps=60", "train.eval_every=30", "checkpoint.every=30", ONE],
}


def lumina(*arguments: str) -> str:
    command = [sys.executable, "-m", "lumina", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def load() -> float:
    return os.getloadavg()[0]


def main(names: list[str]) -> None:
    for name in names or RUNS:
        with tempfile.TemporaryDirectory() as folder:
            cache = {"LUMINA_CACHE": os.environ.get("LUMINA_CACHE", f"{folder}/cache")}
            os.environ |= cache
            Path(cache["LUMINA_CACHE"], "planner-1.json").unlink(missing_ok=True)
            guess = json.loads(lumina("plan", *RUNS[name], "--json"))
            before = load()
            plan = json.loads(lumina("plan", *RUNS[name], "--measure", "--json"))
            start = time.perf_counter()
            lumina("train", *RUNS[name], "--quiet", "--root", f"{folder}/runs")
            actual = time.perf_counter() - start
            (run,) = Path(folder, "runs").iterdir()
            events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
            steps = [event for event in events if event["t"] == "step"]
            row = {
                "name": name,
                "date": time.strftime("%Y-%m-%d %H:%M"),
                "settings": RUNS[name],
                "load": [before, load()],
                "actual": actual,
                "actual_steps": steps[-1]["wall"],
                "planned": plan["run"],
                "planned_step": plan["step"]["seconds"],
                "unmeasured": guess["run"]["total"],
                "off": plan["run"]["total"]["mid"] / actual - 1,
            }
            with (HERE / "total_time.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name}: planned {row['planned']['total']['mid']:.1f}s, took {actual:.1f}s, {row['off']:+.1%}; "
                  f"unmeasured {guess['run']['total']['low']:.0f} to {guess['run']['total']['high']:.0f}s")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
