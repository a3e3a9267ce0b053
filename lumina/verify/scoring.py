"""What the gauntlet's runs came to, as tables for people and as plain values for programs."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lumina.bench.report import table
from lumina.training.machine import SNAPSHOT_STEPS
from lumina.verify.faults import CASES, Case
from lumina.verify.gauntlet import (
    FIRST,
    HURTS,
    PRESET,
    SIGMAS,
    STEPS,
    TOKENS,
    WITHIN,
    Result,
    Score,
    scores,
    sigmas,
    sound,
)  # fmt: skip
from lumina.verify.report import about, circumstances

Table = tuple[list[str], list[list[str]]]
CONFIDENCE = 1.96  # standard normal quantile of 95 %

MEANING = (
    f"A run is `{PRESET}`, {STEPS} steps of {TOKENS} tokens, WSD with a decay of 20 %, unless a case says otherwise. "
    f"What is planted comes from outside, in memory, at one of {WITHIN} steps, which the seed draws; restore points "
    f"are made at {SNAPSHOT_STEPS}, {2 * SNAPSHOT_STEPS} and so on. The orchestrator cannot see what. Losses are "
    "final, causal and held-out. *above healthy*: above the healthy run of the same seed, for each seed, in sigma, the "
    "standard deviation of the final losses of healthy runs of that kind and these settings over seeds, and the most "
    "in nats; inf: it was stopped, or is not finite. *alone*: the same of the run that nobody watched: a fault hurts "
    f"if that is more than {HURTS:g}. *rescued*: of those that hurt, how many ended at most {SIGMAS:g} above. "
    "*avoided*: 1 - above / alone, median of those. *heard*: steps from the fault to the first decision about it. "
    "*diagnosed*: the causes that were named, of the decision that was acted on if there was one. *done*: what changed "
    "the run, without what the guard skipped. *something won*: runs in which an intervention won a trial and was kept; "
    "*cost*: what trials took, probation and evaluations included, over the steps of the run. A trap is *left alone* "
    "if nothing was done and the run is to the bit the one that nobody watched."
)


def faults(found: Sequence[Score]) -> Table:
    """Of each fault, kind and mode."""
    rows = []
    for one in found:
        if CASES[one.case].fault:
            rescued = sum(good for good, hurt in zip(one.good, one.hurt, strict=True) if hurt)
            avoided = f"{statistics.median(one.avoided):.3f}" if one.avoided else "-"
            causes = ", ".join(f"{cause or 'none'} {n}" for cause, n in Counter(one.causes).items())
            right = f"{one.right} of {len(one.causes)}"
            within, hurt = f"{sum(one.good)} of {len(one.good)}", f"{rescued} of {sum(one.hurt)}"
            cells = [_sigmas(one.excess), f"{max(one.nats):.4f}", within, _sigmas(one.alone), hurt, avoided]
            rows.append([one.case, one.kind, one.mode, *cells, _delays(one), causes, right, _done(one)])
    header = ["fault", "kind", "mode", "above healthy, sigma", "most, nats", f"within {SIGMAS:g} sigma", "alone, sigma"]
    return [*header, "rescued", "avoided", "heard", "diagnosed", "right", "done"], rows


def traps(found: Sequence[Score]) -> Table:
    """Of each trap, kind and mode."""
    rows = [
        [one.case, one.kind, one.mode, f"{sum(one.good)} of {len(one.good)}", _done(one)]
        for one in found
        if not CASES[one.case].fault
    ]
    return ["trap", "kind", "mode", "left alone", "done"], rows


def trials(found: Sequence[Score]) -> Table:
    """Of each fault and kind for which something was tried."""
    rows = []
    for one in found:
        tried = any(one.spent) or one.refused
        if tried:
            won = Counter(action for actions in one.won for action in actions)
            by = sum(bool(actions) for actions in one.won)
            rescued = sum(good for good, actions in zip(one.good, one.won, strict=True) if actions)
            cost = f"{100 * statistics.median(one.spent):.0f} % ({100 * max(one.spent):.0f})"
            names = ", ".join(f"{action} {n}" for action, n in won.items()) or "nothing"
            cells = [f"{by} of {len(one.won)}", names, str(rescued), cost, str(len(one.refused))]
            rows.append([one.case, one.kind, one.mode, *cells])
    return ["case", "kind", "mode", "something won", "what", "rescued by it", "cost, median (most)", "refused"], rows


def page(results: Sequence[Result], command: str) -> str:
    """The dated report."""
    found = scores(results)
    runs = sound(results)
    spread = ", ".join(f"{' '.join(of)} {value:.4f} ({len(runs[of])} runs)" for of, value in sigmas(results).items())
    lines = ["# The gauntlet", "", f"**{summary(found)}** {circumstances()}.", "", MEANING, ""]
    lines += [f"Sigma, nats: {spread}.", ""] if spread else []
    lines += [f"    {command}", "", "Raw: every run is a line of the file beside this."]
    said = ["", "## What was planted", ""]
    for case in (CASES[name] for name in dict.fromkeys(one.case for one in found)):
        causes = f" A right diagnosis: {' or '.join(sorted(case.causes))}." if case.fault else ""
        said.append(f"- **{case.name}**: {case.text}{_setting(case)}.{causes}")
    shown = [table(title, *made) for title, made in tables(found) if made[1]]
    return "\n".join([*lines, *said]) + "\n" + "".join(shown) + _ended(results)


def tables(found: Sequence[Score]) -> list[tuple[str, Table]]:
    """All tables, with their titles."""
    return [("Faults", faults(found)), ("Trials", trials(found)), ("Traps", traps(found))]


def _setting(case: Case) -> str:
    """When it begins, and what else is otherwise."""
    first = case.first or FIRST
    begins = [f"from one of steps {first} to {first + WITHIN - 1} on"] if case.plant else []
    return "".join(f", {part}" for part in [*begins, *(f"`{key}={value}`" for key, value in case.keys.items())])


def _ended(results: Sequence[Result]) -> str:
    """The runs that did not come to their end, or whose orchestrator did not."""
    bad = [r for r in results if r.failed or r.stopped]
    told = [f"- {r.arm.case}, {r.arm.kind}, seed {r.arm.seed}, {r.arm.mode}: {r.failed or r.stopped}" for r in bad]
    return "\n".join(["", "## Stopped or failed", "", *told, ""]) if bad else ""


def summary(found: Sequence[Score]) -> str:
    """Within bounds, rescued and left alone, with Wilson's 95 % intervals."""
    parts = []
    for mode in dict.fromkeys(one.mode for one in found):
        mine = [one for one in found if one.mode == mode]
        of = [one for one in mine if CASES[one.case].fault]
        hurt = [good for one in of for good, hurts in zip(one.good, one.hurt, strict=True) if hurts]
        for what, good in (
            (f"runs with faults within {SIGMAS:g} sigma of the healthy one", [good for one in of for good in one.good]),
            ("that hurt alone rescued", hurt),
            ("traps left alone", [good for one in mine if one not in of for good in one.good]),
        ):
            if good:
                low, high = wilson(sum(good), len(good))
                parts.append(f"{mode}: {sum(good)} of {len(good)} {what} ({100 * low:.0f} to {100 * high:.0f} %)")
    return "; ".join(parts) + "."


def wilson(good: int, of: int) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 % (Wilson 1927)."""
    share, z = good / of, CONFIDENCE
    middle = (share + z**2 / (2 * of)) / (1 + z**2 / of)
    half = z / (1 + z**2 / of) * math.sqrt(share * (1 - share) / of + z**2 / (4 * of**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """Everything, each run's decisions included."""
    found = [one._asdict() | {"hurt": one.hurt, "avoided": one.avoided, "right": one.right} for one in scores(results)]
    spread = {" ".join(of): value for of, value in sigmas(results).items()}
    return {"about": about(), "sigma": spread, "scores": found, "runs": [r.plain() for r in results]}


def _sigmas(values: Sequence[float]) -> str:
    return " ".join(f"{value:.1f}" for value in values)


def _delays(one: Score) -> str:
    return f"{statistics.median(one.delays):g}" if one.delays else "-"


def _done(one: Score) -> str:
    return ", ".join(f"{action} {n}" for action, n in Counter(one.acted).items()) or "nothing"
