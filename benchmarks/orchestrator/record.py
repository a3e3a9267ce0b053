"""Records healthy runs: what the detectors are calibrated on, kept in `tests/orchestrator/healthy.json.xz`.

    python benchmarks/orchestrator/record.py FOLDER          # trains what FOLDER has not; about 25 minutes of one core
    python benchmarks/orchestrator/record.py FOLDER pack     # writes the fixture from FOLDER

Each run is of the embedded corpus, on a CPU in fp32 with one thread. Losses and norms keep 5 digits; `moe` and `mod`
events are of `EVERY` steps, `probe` events of `LOOK`.
"""

from __future__ import annotations

import json
import lzma
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

EVERY, LOOK = 10, 20
FIXTURE = Path(__file__).parents[2] / "tests" / "orchestrator" / "healthy.json.xz"

SMALL = {"model.width": 32, "model.layers": 2, "model.heads": 2, "model.kv_heads": 1, "model.ffn": 64}
SMALL_MOE = {key: value for key, value in SMALL.items() if key != "model.ffn"} | {"model.moe.ffn": 32}
SOFTMAX = {"model.moe.score": "softmax", "model.moe.balance": 1e-2, "model.moe.bias_rate": 0, "model.moe.z_loss": 1e-3}
COSINE = {"train.schedule": "cosine"}
WARM = [{"at": 0}, {"at": 0.5, "lr": 6e-3, "warmup": 0.05}]
CHATS = {"data.train": ["sample", "sample_chat"], "data.mode": "hybrid_sequential", "data.base_ratio": 0.6}

# name, steps, tokens a step, settings
RUNS: list[tuple[str, int, int, dict[str, Any]]] = [
    ("dense wsd", 2000, 512, {}),
    ("dense cosine", 800, 1024, COSINE),
    ("dense two sequences", 2000, 128, {}),
    ("dense adamw", 1200, 512, {"train.optimizer": "adamw"}),
    ("dense adamw high", 1000, 512, {"train.optimizer": "adamw", "train.lr": 1e-2} | COSINE),
    ("dense small", 2400, 256, SMALL),
    ("dense large batch", 400, 2048, {"train.decay": 0.2}),
    ("dense phases", 1000, 512, {"train.phases": WARM, "train.decay": 0.2}),
    ("dense chats", 1000, 512, CHATS | {"train.decay": 0.2}),
    ("moe wsd", 1500, 512, {}),
    ("moe cosine", 800, 512, COSINE),
    ("moe two sequences", 1200, 128, {"train.decay": 0.2}),
    ("moe softmax", 1200, 512, SOFTMAX),
    ("moe eight", 1000, 512, {"model.moe.experts": 8, "model.moe.ffn": 64, "train.decay": 0.1}),
    ("moe small adamw", 1200, 256, SMALL_MOE | {"train.optimizer": "adamw"}),
    ("moe chats", 800, 512, CHATS),
    ("mod wsd", 1500, 512, {}),
    ("mod cosine", 800, 512, {"model.mod.capacity": 0.125} | COSINE),
    ("mod two sequences", 1200, 128, {}),
    ("mod small adamw", 1500, 256, SMALL | {"train.optimizer": "adamw", "train.decay": 0.2}),
    ("mod anneal", 800, 512, {"model.mod.anneal": 0.25}),
    ("hybrid wsd", 1200, 512, {}),
    ("hybrid cosine", 800, 1024, COSINE),
    ("hybrid two sequences", 1600, 128, {"train.decay": 0.2}),
    ("hybrid small adamw", 1200, 256, SMALL_MOE | {"train.optimizer": "adamw"}),
    ("hybrid softmax", 800, 512, SOFTMAX),
]


def settings(name: str, steps: int, tokens: int, extra: dict[str, Any], seed: int) -> dict[str, Any]:
    """Of the run `name`, whose first word is its kind."""
    usual = {"model.kind": name.split()[0], "train.steps": steps, "train.batch_tokens": tokens, "train.seed": seed}
    usual |= {"data.train": ["sample"], "train.warmup": 0.05, "checkpoint.every": 0, "telemetry.log_every": EVERY}
    return usual | {"orchestrator.probe_every": LOOK} | extra


def short(value: Any, digits: int = 5) -> Any:
    """The value with fewer digits."""
    if isinstance(value, float) and math.isfinite(value) and value:
        return round(value, digits - 1 - math.floor(math.log10(abs(value))))
    return [short(item, digits) for item in value] if isinstance(value, list) else value


def record(number: int) -> dict[str, Any]:
    from lumina.training.trainer import Trainer

    name, steps, tokens, extra = RUNS[number]
    keys = settings(name, steps, tokens, extra, seed=100 + number)
    events: list[dict[str, Any]] = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        Trainer("tiny", keys, root=root, fresh=True, listeners=[events.append]).fit()
    of = {
        kind: [event for event in events if event["t"] == kind] for kind in ("step", "moe", "mod", "probe", "forecast")
    }
    begun = next(event for event in events if event["t"] == "run")
    return {
        "name": name,
        "keys": keys,
        "seconds": round(time.perf_counter() - start),
        "phases": begun["phases"],
        "every": EVERY,
        "step": {key: short([e[key] for e in of["step"]]) for key in ("loss", "acc", "lr", "grad_norm", "agree")},
        "moe": [{"step": e["step"], "load": e["load"], "entropy": short(e["entropy"], 4)} for e in of["moe"]],
        "mod": [{"step": e["step"], "taken": short(e["taken"], 4), "agree": short(e["agree"], 4)} for e in of["mod"]],
        "probe": [{"step": e["step"], "loss": short(e["loss"]), "churn": short(e["churn"], 3)} for e in of["probe"]],
        "forecast": [
            {"step": e["step"], "deviation": {k: short(v) for k, v in e["deviation"].items()}}
            for e in of["forecast"]
            if e.get("deviation")
        ],
    }


def main() -> None:
    folder = Path(sys.argv[1])
    if sys.argv[2:] == ["pack"]:
        runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
        text = json.dumps({"about": __doc__.splitlines()[0], "runs": runs}, separators=(",", ":"))
        FIXTURE.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
        print(f"{len(runs)} runs, {FIXTURE.stat().st_size:,} bytes")
        return
    for number in sorted(range(len(RUNS)), key=lambda n: (n * 7) % len(RUNS)):  # kinds by turns
        path = folder / f"{number:02}.json"
        if not path.exists():
            path.write_text(json.dumps(record(number)))
            print(RUNS[number][0], flush=True)


if __name__ == "__main__":
    main()
