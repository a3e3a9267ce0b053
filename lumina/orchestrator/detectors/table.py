"""All detectors. Rows are in the order in which findings of one step are heard: what is certain comes first."""

from __future__ import annotations

from lumina.orchestrator.detectors import (
    attention,
    data,
    depth,
    divergence,
    experts,
    forecast,
    invariants,
    numerics,
    pace,
    spike,
)
from lumina.orchestrator.finding import Detector

DETECTORS = (
    Detector("invariant", invariants.invariant, hard=True),
    Detector("looked", invariants.looked, hard=True, on="look"),
    Detector("off_plan", invariants.off_plan, hard=True),
    Detector("non_finite", numerics.non_finite, hard=True),
    Detector("loader", data.loader, hard=True),
    Detector("divergence", divergence.divergence, hard=True),
    Detector("attention", attention.attention, hard=True),
    Detector("golden", data.golden, on="look"),
    Detector("explosion", spike.explosion),
    Detector("spike", spike.spike),
    Detector("pace", pace.pace, in_decay=False),
    Detector("drift", forecast.drift, in_decay=False, on="forecast"),
    Detector("plateau", forecast.plateau, in_decay=False, on="forecast"),
    Detector("starvation", experts.starvation),
    Detector("collapse", experts.collapse),
    Detector("over_balance", experts.over_balance),
    Detector("router_gradient", experts.router_gradient),
    Detector("mod_capacity", depth.capacity),
    Detector("mod_agreement", depth.agreement),
)
