"""Decisions, out as events and back as an incident report.

Whatever is done is a `decision` event before it is done (a way back is a `run` event with `why`). Its evidence holds
`finding` (rule, since, text, values beside their thresholds), `diagnosis` (cause, verdict, text, replay), `window` (the
newest values of what was judged); its `kind` is `act`, `advise` or `outcome`, which says whether an earlier one held.
What it lays over the plan is among the event's `overlays`, and by that name it is undone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lumina.orchestrator import actions
from lumina.orchestrator.actions import RESUME, SAME
from lumina.orchestrator.diagnosis import Diagnosis
from lumina.orchestrator.finding import Finding
from lumina.orchestrator.policy import Choice, Open
from lumina.orchestrator.protocol import Decision
from lumina.orchestrator.signals import Signals

LARGEST = 1e6  # nats: beyond is no loss
SHOWN = 24  # newest steps of a window of evidence
WINDOW = ("loss", "grad_norm", "lr", "update_ratio")
# What each decision is in words, and what undoes it, if not the names of what it laid over the plan.
SKIPPED = "skip_step"
WORDS = {
    SKIPPED: ("the step was skipped", "nothing: the guard let the step move nothing"),
    "rewind_replay": ("go back and replay", SAME),
    "rewind_skip": ("go back and leave the batches out", ""),
    "stop": ("stop and hand over", RESUME),
    "watch": ("watch", ""),
    "trial": ("a trial", ""),
}


def decision(finding: Finding, why: Diagnosis, choice: Choice, signals: Signals) -> Decision:
    """With everything that it was made of, as plain values."""
    evidence: dict[str, Any] = {
        "finding": {"since": finding.since, "text": finding.text, "hard": finding.hard, "values": dict(finding.values)},
        "diagnosis": {"cause": why.cause, "verdict": why.verdict, "text": why.text, **why.values},
        "clip_rate": _share(signals.series["clipped"][-100:]),
        "window": {name: signals.series[name][-SHOWN:] for name in WINDOW},
        "to": choice.to,
    }
    return Decision(finding.rule, choice.action, plain(evidence), f"{why.text} {_sentence(choice.reason)}")


def outcome(tried: Open, step: int, held: bool = True) -> dict[str, Any]:
    """The fields of the event that says whether an intervention held until `step`."""
    evidence = {"of": tried.step, "steps": step - tried.step, "held": held}
    came = "has held: nothing came again" if held else f"has not held: at step {step} something came again"
    reason = f"{_words(tried.action)}, decided at step {tried.step}, {came}"
    return {"kind": "outcome", "rule": tried.rule, "action": tried.action, "evidence": evidence, "reason": reason}


def probation(tried: Open, step: int, held: bool, gain: float, end: float, spent: float) -> Decision:
    """The decision to keep what won a trial, or to undo it."""
    came = "has held" if held else "has not held, and is undone"
    if not math.isfinite(end):
        how = "it comes to no end that is finite"
    elif gain > LARGEST:
        how = "it comes to an end, and the run without it to none"
    else:
        how = f"it ends {abs(gain):.4f} nats {'below' if gain > 0 else 'above'} what the run comes to without it"
    how = f"after {step - tried.tried} steps and a probe of {tried.probe} {how}"
    reason = f"{tried.action}, decided at step {tried.step}, {came}: {how}"
    found = {"gain": gain, "end": end, "without": tried.without, "probe": tried.probe, "trial": tried.trial}
    found |= {"spent": spent}
    evidence = {"of": tried.step, "steps": step - tried.step, "held": held, "step": step, "probation": found}
    action = tried.action if held else f"undo {', '.join(tried.laid)}"
    return Decision(tried.rule, action, evidence, reason, [f"trials/{tried.trial}-probation.jsonl"])


def unjudged(tried: Open, step: int, because: str) -> dict[str, Any]:
    """The fields of the event that says why nobody judges what is on probation: it stays."""
    reason = f"{tried.action}, decided at step {tried.step}, stays, but was not judged: {because}"
    return {
        "kind": "outcome",
        "rule": tried.rule,
        "action": tried.action,
        "evidence": {"of": tried.step},
        "reason": reason,
    }


def failed(tried: Open, why: Decision, step: int) -> Decision:
    """The decision to undo what is on probation, because something came that cannot wait."""
    reason = f"{tried.action}, decided at step {tried.step}, has not held: {why.reason}"
    evidence = why.evidence | {"of": tried.step, "held": False, "step": step}
    evidence |= {"probation": {"spent": 0.0, "trial": tried.trial}}
    return Decision(tried.rule, f"undo {', '.join(tried.laid)}", evidence, reason)


def _share(values: Sequence[float | None]) -> float | None:
    """The mean of the known ones."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def plain(value: Any) -> Any:
    """Tuples as lists, so that JSON gives it back as it was."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


@dataclass
class Entry:
    """One decision, with what came of it."""

    step: int
    attempt: int
    kind: str  # act, advise
    rule: str
    action: str
    reason: str = ""
    evidence: dict[str, Any] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)
    last: int = 0  # the last of the steps in a row that the guard did not take
    outcome: str = ""
    laid: list[str] = field(default_factory=list)  # names of what it laid over the plan
    state: str = ""  # what became of that: in force, until step n, done, undone
    undo: list[str] = field(default_factory=list)  # what `lumina undo` takes, each, to go back to before it
    went_back: bool = False  # its attempt is another than that in which it was decided

    @property
    def undone(self) -> str:
        """What undoes it where no name does; empty if nothing was done, or it was undone."""
        if self.laid or self.kind == "advise":
            return ""
        name = re.split("[= ]", self.action)[0]
        if self.rule != "hand":
            return WORDS[name][1] if name in WORDS else ""
        asked = actions.ACTIONS.get(name)
        moved = asked is not None and asked.how == "moves"  # else it lay there already
        return SAME if name == "rewind" else asked.undone if asked and moved else ""

    @property
    def cause(self) -> str:
        """Of the diagnosis; empty if it has none, as an action by hand."""
        return str(self.evidence.get("diagnosis", {}).get("cause", ""))

    def fields(self) -> dict[str, Any]:
        """As plain values, for `--json`."""
        names = (
            "step", "last", "attempt", "kind", "rule", "action", "reason", "evidence", "links", "outcome", "state",
            "undo", "undone",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


def entries(events: Iterable[Mapping[str, Any]]) -> list[Entry]:
    """All decisions of a log, oldest first: also those of attempts that were undone, for they undid them.

    What several events tell of one decision is one entry. Events may be of older versions, or of a person's hand.
    """
    found: list[Entry] = []
    known: dict[str, Any] = {}  # all that ever lay over the plan
    there: dict[str, Any] = {}  # and what lies there at last
    for event in events:
        if isinstance(event.get("overlays"), list):
            there = {str(one.get("id")): one for one in event["overlays"]}
        fresh = [id for id in there if id not in known]
        known |= there
        why = event if event.get("t") == "decision" else event.get("why") if event.get("t") == "run" else None
        if not isinstance(why, Mapping) or "rule" not in why or "action" not in why:
            continue
        if why.get("kind") == "outcome":
            _settle(found, why)
            continue
        new = Entry(
            step=_decided(event, why),
            attempt=event.get("attempt", 0),
            kind=why.get("kind", "act"),
            rule=why["rule"],
            action=why["action"],
            reason=why.get("reason", ""),
            evidence=dict(why.get("evidence", {})),
            links=list(why.get("links", [])),
            laid=fresh,
            went_back=event["t"] == "run",
        )
        if not _fold(found, new):
            found.append(new)
    for entry in found:
        entry.undo = [id for id in entry.laid if id in there]
        entry.state = _state([there[id] for id in entry.undo]) if entry.laid else ""
    return found


def _state(laid: list[dict[str, Any]]) -> str:
    """What became of what a decision laid over the plan, of which this is still there."""
    if not laid:
        return "undone"
    ends = [(one.get("begin"), one.get("end")) for one in laid]
    states = [
        "in force" if end is None else "done once" if end == begin else f"until step {end}" for begin, end in ends
    ]
    return ", ".join(dict.fromkeys(states))


def _decided(event: Mapping[str, Any], why: Mapping[str, Any]) -> int:
    """The step at which it was decided: a `run` event has the one gone back to."""
    step = why.get("evidence", {}).get("step", event.get("step", 0))
    return int(step)


def _fold(found: list[Entry], new: Entry) -> bool:
    """Adds a second event of the same decision to its entry: a way back is the last, and begins another attempt."""
    if new.action == SKIPPED and not new.evidence.get("finding"):
        for entry in reversed(found[-3:]):
            if (entry.action, entry.attempt) == (SKIPPED, new.attempt) and max(entry.step, entry.last) == new.step - 1:
                entry.last = new.step
                return True
    for entry in reversed(found[-3:]):
        same = (entry.step, entry.rule, entry.action) == (new.step, new.rule, new.action)
        if same and not entry.went_back and new.attempt == entry.attempt + new.went_back:
            entry.attempt, entry.went_back = new.attempt, new.went_back
            entry.evidence = entry.evidence | new.evidence
            entry.reason = max(entry.reason, new.reason, key=len)
            entry.laid += new.laid
            entry.links = [*entry.links, *(link for link in new.links if link not in entry.links)]
            entry.kind = "act" if "act" in (entry.kind, new.kind) else entry.kind
            return True
    return False


def _settle(found: list[Entry], why: Mapping[str, Any]) -> None:
    of = why.get("evidence", {}).get("of")
    for entry in reversed(found):
        if (entry.step, entry.rule, entry.action) == (of, why["rule"], why["action"]):
            entry.outcome = str(why.get("reason", ""))
            return


# -- the incident report -----------------------------------------------------------------------------------------------


def told(entry: Entry) -> str:
    """A few lines that a person understands who was not there; `why` has the finding, the replay and the choice."""
    finding, why = entry.evidence.get("finding", {}), entry.evidence.get("diagnosis", {})
    how = "advised" if entry.kind == "advise" else "by hand" if entry.rule == "hand" else "done"
    lines = [
        f"{_steps(entry)}, attempt {entry.attempt}: {entry.rule.replace('_', ' ')} -> {_words(entry.action)} ({how})"
    ]
    if finding:
        lines.append(f"  began     step {finding['since']}")
        lines += [f"  measured  {figures}"] if (figures := _figures(finding.get("values", {}))) else []
    if why:
        lines.append(f"  cause     {why['cause']}")
    lines += [f"  why       {entry.reason}"] if entry.reason else []
    lines += _tried(entry.evidence.get("trial"))
    for name, values in entry.evidence.get("window", {}).items():
        known = [value for value in values[-8:] if value is not None]
        lines += [f"  {name:<9} {' '.join(f'{value:.4g}' for value in known)}"] if known else []
    lines += [f"  outcome   {entry.outcome}"] if entry.outcome else []
    lines += [f"  is now    {entry.state}"] if entry.state else []
    lines += [f"  undo      {names}" for names in [" ".join(entry.undo), entry.undone] if names]
    lines += [f"  see       {link}" for link in entry.links]
    return "\n".join(lines)


def _tried(trial: Any) -> list[str]:
    """The arms of a trial, and what it cost."""
    if not isinstance(trial, Mapping):
        return []
    lines = [f"  tried     {arm['asks']}: {_arm(arm)}" for arm in trial["arms"] if "gain" in arm]
    held = f"{trial['pairs']} pairs of {trial['steps']} steps and {trial['probe']} of the probe"
    cost = f"{trial['spent']:.0f} steps' worth of compute, {trial['seconds']:.0f} s counted"
    return [*lines, f"  cost      {cost}: {held}; {trial['left']:.0f} are left"]


def _arm(arm: Mapping[str, Any]) -> str:
    gain, low, noise = (arm[name] for name in ("gain", "low", "noise"))
    if not math.isfinite(gain):
        return "ends where the control does not" if arm["won"] else "no end that can be compared"
    return f"{gain:+.4f} nats, at least {low:+.4f}, noise of a pair {noise:.4f}{', won' if arm['won'] else ''}"


def _words(action: str) -> str:
    return WORDS[action][0] if action in WORDS else action


def _steps(entry: Entry) -> str:
    return f"steps {entry.step} to {entry.last}" if entry.last else f"step {entry.step}"


def _figures(values: Mapping[str, Any]) -> str:
    numbers = {name: value for name, value in values.items() if type(value) in (int, float)}
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items())


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""
