"""Why it happened: a finding, the suspect step taken again, and what else the signals show.

Attribution by replay, as in Megatron's rerun machine: what comes out different is the hardware, or a fault that is
gone; what comes out the same is the data if other batches are fine on the same weights, else the state or the plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lumina.orchestrator.detectors import invariants
from lumina.orchestrator.finding import Finding
from lumina.orchestrator.protocol import Replay
from lumina.orchestrator.robust import median
from lumina.orchestrator.signals import Signals
from lumina.orchestrator.windows import BLOCK, LEAVES, SEVERE

Cause = Literal["data", "learning rate", "optimizer state", "numerics", "router", "depth", "config", "hardware", "none"]
Verdict = Literal["differs", "data", "any batch", "damaged", ""]

# What a broken invariant says of the cause, by its name.
INVARIANTS: dict[str, Cause] = {
    "schedule": "learning rate", "optimizer step": "optimizer state", "weights": "optimizer state", "batch": "data",
    "data": "data", "config": "config", "router bias": "router", "predictor": "depth",
    "replicas": "hardware", "finite": "numerics",
}  # fmt: skip
RULES: dict[str, Cause] = {
    "loader": "data", "golden": "data", "starvation": "router", "collapse": "router", "over_balance": "router",
    "router_gradient": "router", "mod_capacity": "depth", "mod_agreement": "depth",
    "plateau": "learning rate", "pace": "learning rate", "spike": "none",
}  # fmt: skip
JUMP = 3.0  # times what was usual: of a learning rate in the stable part, of what a step moved
SPAN = 20  # steps around the beginning in which causes are looked for
RANGES = 2.0  # of the losses of other batches: as far above the worst of them a batch is another kind of data
PUSHED = 3  # steps whose median gradient of the routers is looked at: an explosion is heard after so many
GROWS = 2.3  # root mean square of g / sqrt(v), above which losses spike 1 to 8 steps later (Wortsman et al. 2023)


@dataclass(frozen=True)
class Diagnosis:
    """Of a finding. `text` is one paragraph for a person."""

    cause: Cause
    text: str
    verdict: Verdict = ""  # of the replay; empty without
    ahead: int = 0  # batches that follow and are as bad, as the replay has it
    lost: float | None = None  # share of what had been learned that the step costs, where the replay came out otherwise
    values: dict[str, Any] = field(default_factory=dict)


def diagnose(finding: Finding, replay: Replay | None, signals: Signals) -> Diagnosis:
    """What certainty is there: broken invariants, then the replay, then what the signals show."""
    if told := finding.values.get("follows"):
        return Diagnosis(told, f"Step {finding.step}: {finding.text}. The cause was found before: {told}.")
    verdict = judge(replay) if replay else ""
    shown = shows(finding, signals)
    cause, why = _cause(finding, verdict, replay, shown)
    told = [f"Step {finding.step}: {finding.text}.", _told(verdict, replay, finding), why]
    values: dict[str, Any] = {"shown": {name: text for name, (_, text) in shown.items()}}
    if replay:
        values["replay"] = {"loss": replay.loss, "again": replay.again, "same": replay.same}
        values["replay"] |= {"others": list(replay.others), "heldout": replay.heldout, "ahead": replay.ahead}
        values["replay"] |= {"before": replay.before, "others_before": list(replay.others_before)}
    text = " ".join(sentence for sentence in told if sentence)
    lost = _lost(replay, signals) if replay and verdict == "differs" else None
    return Diagnosis(cause, text, verdict, replay.ahead if replay else 0, lost, values)


def _lost(replay: Replay, signals: Signals) -> float | None:
    """Of the nats below a uniform guess; None if something is not finite, or nothing was learned."""
    learned = signals.facts.uniform - replay.again
    lost = (replay.loss - replay.again) / learned if learned > 0 else math.nan
    return lost if math.isfinite(lost) else None


def judge(replay: Replay) -> Verdict:
    """What the step taken again says; `any batch` if others are as bad as it, or not finite, and `damaged` if they are
    not finite to the restore point's weights either.

    Bad data soon spoils weights for all data; so the restore point's, which it has not yet spoiled, are asked, too.
    """
    if not replay.same:
        return "differs"
    if not replay.others:
        return ""
    if not _finite(replay.others_before or replay.others):
        return "damaged"
    return "data" if _is_alone(replay) or _was_alone(replay) else "any batch"


def _finite(losses: Sequence[float]) -> bool:
    return all(map(math.isfinite, losses))


def _alone(loss: float, others: Sequence[float]) -> bool:
    """Whether a batch is far worse than others are: another kind of data."""
    if not math.isfinite(loss):
        return True
    return loss - max(others) > max(SEVERE, RANGES * (max(others) - min(others)))


def _is_alone(replay: Replay) -> bool:
    """To the weights of the step."""
    return _finite(replay.others) and _alone(replay.again, replay.others)


def _was_alone(replay: Replay) -> bool:
    """To the restore point's weights."""
    others = replay.others_before
    return bool(others) and _finite(others) and _alone(replay.before, others)


def shows(finding: Finding, signals: Signals) -> dict[Cause, tuple[int, str]]:
    """Causes that signals around the beginning point to: how surely (3: it is told, 1: a hint), and by what."""
    found: dict[Cause, tuple[int, str]] = {}

    def hint(cause: Cause, sure: int, text: str) -> None:
        if sure > found.get(cause, (0, ""))[0]:
            found[cause] = sure, text

    for sentence in _broken(finding, signals):
        hint(INVARIANTS.get(invariants.name(sentence), "config"), 3, sentence)
    if rate := _jump("lr", finding, signals):
        hint("learning rate", 2, f"the learning rate was {rate:.3g} times what it was before")
    if (moved := _jump("update_ratio", finding, signals)) and not rate:
        hint("optimizer state", 2, f"a step moved the weights {moved:.3g} times as far as before, at the same rate")
    if (rms := max(_around("adam_rms", finding, signals), default=0.0)) > GROWS:
        hint("optimizer state", 1, f"g / sqrt(v) reached {rms:.2f}, above {GROWS}")
    if signals.contents.again > 1:
        hint("data", 3, f"the last {signals.contents.again} batches had come before")
    if len(signals.apart) > 1 and signals.apart[-1][1] - median([one for _, one in signals.apart[:-1]]) > SEVERE:
        hint("data", 2, "the golden batch, read as training reads, has left the held-out text")
    if signals.facts.top_k and (pushed := signals.push.times(PUSHED) or 0.0) > LEAVES:
        hint("router", 2, f"the routers get {pushed:.3g} times the gradient that they got")
    loads = signals.loads
    if any(loads.narrow) or any(once and steps > BLOCK for once, steps in zip(loads.even, loads.few, strict=True)):
        hint("router", 1, "few experts get most of the tokens")
    if finding.rule in RULES:
        hint(RULES[finding.rule], 2, finding.text)
    return found


def _cause(
    finding: Finding, verdict: Verdict, replay: Replay | None, shown: dict[Cause, tuple[int, str]]
) -> tuple[Cause, str]:
    """The cause, and a sentence that says why it is taken for it."""
    cause, (sure, text) = max(shown.items(), key=lambda item: item[1][0], default=("none", (0, "")))
    if sure == 3 or (sure == 2 and finding.rule in RULES and finding.rule != "spike"):
        return cause, f"That points to the {cause}: {text}." if text != finding.text else f"The cause: {cause}."
    if verdict == "differs" and sure < 2:
        noise = "" if replay is None or replay.exact else ", beyond the noise that is allowed for on this device"
        return "hardware", f"So it is a fault of the hardware, or one that came from outside and is gone{noise}."
    if verdict == "data" and replay and _is_alone(replay):
        return "data", "So it is these batches that the weights of that step cannot bear: other data is fine."
    if verdict == "data" and cause != "learning rate":
        return "data", "So it is these batches: they have spoiled the weights of that step for other data, too."
    if verdict == "damaged" or (replay and replay.same and not _finite(replay.others)):
        return "numerics", "So weights or optimizer hold values that are not finite."
    if cause not in ("none",):
        return cause, f"That points to the {cause}: {text}."
    if finding.rule == "non_finite":
        return "numerics", "A number left the range of its format, or what it is computed from was damaged."
    if verdict == "any batch":
        return "optimizer state", "So it is the state, weights or moments, and no signal says what moved it."
    return "none", "Nothing points to a cause: it may be the batch, and may heal by itself."


def _told(verdict: Verdict, replay: Replay | None, finding: Finding) -> str:
    if replay is None:
        return "" if not finding.hard else "There is no restore point to take the step again from."
    first = f"Taken again from the restore point, step {replay.step} came to {replay.again:.4g}"
    if verdict == "differs":
        return f"{first} instead of {replay.loss:.4g}: it does not come out the same."
    same = f"{first}, the same{' to the bit' if replay.exact else ''}"
    told = f"{same}; other batches on the same weights: {_losses(replay.others)}"
    told = f"{told}, and the held-out text: {replay.heldout:.3g}."
    if verdict != "data" or _is_alone(replay):
        return told
    before = f"On the restore point's weights this batch comes to {replay.before:.3g}"
    return f"{told} {before}, others to {_losses(replay.others_before)}."


def _losses(losses: Sequence[float]) -> str:
    return ", ".join(f"{loss:.3g}" for loss in losses)


def _broken(finding: Finding, signals: Signals) -> list[str]:
    """Invariants that are broken now, or by the finding itself."""
    now = list(signals.seen.broken) if signals.seen else []
    now += signals.look.broken if signals.look and signals.look.step >= finding.since - SPAN else ()
    return [
        *finding.values.get("sentences", []),
        *now,
        *(text for step, text in signals.broken if _near(step, finding)),
    ]


def _near(step: int, finding: Finding) -> bool:
    return finding.since - SPAN <= step <= finding.step


def _around(name: str, finding: Finding, signals: Signals) -> list[float]:
    """A series from `SPAN` steps before the beginning on."""
    back = signals.step - finding.since + SPAN
    return [value for value in signals.series[name][-max(1, back) :] if value is not None]


def _jump(name: str, finding: Finding, signals: Signals) -> float | None:
    """How many times the usual value a series reached since the beginning; None if less than `JUMP` times.

    A planned change is no jump.
    """
    since = max(finding.since - SPAN, signals.changed)
    values = signals.series[name]
    here = max(0, len(values) - (signals.step - since) - 1)
    before = [value for value in values[:here] if value]
    around = [value for value in values[here:] if value is not None]
    if len(before) < 5 or not around:
        return None
    times = max(around) / median(before[-SPAN:])
    return times if times > JUMP else None
