"""The page of trials says what the code does: what is tried, for what, how long, and what it costs."""

from __future__ import annotations

import re
from pathlib import Path

from watched import FACTS, MOD, MOE

from lumina.orchestrator import policy, trial
from lumina.orchestrator.candidates import _LADDERS
from lumina.orchestrator.finding import Finding
from lumina.orchestrator.policy import Policy
from lumina.orchestrator.signals import Signals

PAGE = (Path(__file__).parents[2] / "docs" / "trials.md").read_text(encoding="utf-8")


def row(fault: str) -> str:
    """A fault, and what each of its trials is made of, for every load that a router may show."""
    facts = MOE if fault in ("router", "over_balance") else MOD if fault == "depth" else FACTS
    cells = []
    for rung in _LADDERS[fault]:
        names: dict[str, None] = {}
        signals = Signals(facts)
        signals.loads.last = signals.loads.recent = [[1.9, 1.9, 0.2, 0.0]] if facts is MOE else []
        for rule in ("pace", "plateau", "drift", "collapse"):
            for values in ({"times": 10.0}, {}) if rule == "pace" else ({},):
                found = rung(Finding(rule, 300, 290, "", False, values), signals)
                names |= dict.fromkeys(one.action for one in found)
        cells.append(", ".join(f"`{name}`" for name in names))
    return f"| {fault} | {' | '.join([*cells, *([''] * (2 - len(cells)))])} |"


def test_the_table_of_candidates_is_the_code() -> None:
    there = [line for line in PAGE.splitlines() if line.startswith("| ") and line.split(" | ")[0][2:] in _LADDERS]
    assert there == [row(fault) for fault in _LADDERS], "\n".join(row(fault) for fault in _LADDERS)


def test_what_it_says_of_sizes_costs_and_rules_is_the_code() -> None:
    one = Policy("act", FACTS._replace(steps=62_400, budget=0.03))
    least = trial.Size(trial.SHORTEST, round(trial.PROBE * trial.SHORTEST), trial.PAIRS)
    cost = least.cost(1, placebo=True)
    assert cost <= one.left < cost + 10
    assert trial.PROBE == 1
    for said in (
        f"at {trial.ALPHA} over the number", f"above {trial.LEAST} nats", "up to three candidates",
        f"between {trial.SHORTEST} (", f"and {trial.LONGEST};", f"r is {trial.PAIRS}, and up to {trial.MOST_PAIRS}",
        f"takes {cost:,} steps' worth: 3 % of 62,000 steps",
    ):  # fmt: skip
        assert said in PAGE, said
    assert policy.MOST_TRIED == 3
    lasts = re.search(r"Only what lasts is tried for: (.*?)\. A spike", PAGE)
    assert lasts
    assert set(re.findall(r"`(\w+)`", lasts[1])) == policy.TRIED
