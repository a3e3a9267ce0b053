"""Experts that get too little, or routers that give all to few, or to all the same: never below the noise of counting.

Balanced random routing of n assignments has a largest load of 1 + sqrt(2 ln E E / n) of the mean, so loads are added up
until each expert expects `windows.EXPECTED`. A selection bias moves by `bias_rate` a step: an expert 0.5 below the
threshold needs 0.5 / bias_rate steps to come back, before which nothing is alarming (Wang et al. 2024, 2408.15664).
"""

from __future__ import annotations

import math

from lumina.orchestrator.finding import Finding
from lumina.orchestrator.robust import median
from lumina.orchestrator.signals import Signals
from lumina.orchestrator.windows import BLOCK, BLOCKS, EVEN, EXPECTED, FEW, LATEST, LEAVES, STARVED, entropy, floor

REVIVES = 0.5  # of a score, which a bias makes up for
USUAL = 1e-3  # bias rate that is reckoned with where there is none
STARVES = 1000  # steps below a tenth of the mean
DEAD = 0.01  # of the mean
DIES = 100  # steps with no token at all of an expert that had its share: twice the longest of recorded runs
LASTS = 300  # steps: for a hundred, domains of the data make such loads in a healthy run of small batches
FALLS = 120  # steps of few, or of one that takes nearly all: of recorded runs 90 at most
FLOORS = 3.0
FLAT = 0.5  # of the floor: healthy routers, which choose by what tokens say, are at 3 times and more


def settled(signals: Signals) -> bool:
    """Whether biases had time to balance, since the run began or what it routes was changed."""
    rate = signals.facts.bias_rate or USUAL
    return signals.step - max(signals.first - 1, signals.changed) > REVIVES / rate


def starvation(signals: Signals) -> Finding | None:
    """An expert that had its share and gets nothing for 100 steps; or is below a tenth of the mean load for 1,000, or
    for 300 and then below a hundredth."""
    loads = signals.loads
    if dead := _dead(signals):
        layer, expert = dead[0]
        steps = max(loads.silent[at][e] for at, e in dead)
        had = f"{loads.had[layer][expert]:.2f} of the mean load"
        text = f"expert {expert} of layer {layer} had {had} and gets nothing, for {loads.silent[layer][expert]} steps"
        values = {"layer": layer, "experts": [e for at, e in dead if at == layer], "dead": dead, "steps": steps}
        values |= {"had": loads.had[layer], "threshold": DIES}
        return Finding("starvation", signals.step, signals.step - steps + 1, text, False, values)
    if not loads.whole or not settled(signals):
        return None
    for layer, (load, low) in enumerate(zip(loads.last, loads.low, strict=True)):
        hungry = [e for e, value in enumerate(load) if low[e] >= (LASTS if value < DEAD else STARVES)]
        if hungry and 1 - min(load) > FLOORS * floor(len(load), _counted(signals)):
            steps = max(low[e] for e in hungry)
            text = f"expert {hungry[0]} of layer {layer} gets {load[hungry[0]]:.3f} of the mean load, for {steps} steps"
            values = {"layer": layer, "experts": hungry, "load": load, "threshold": STARVED, "steps": steps}
            return Finding("starvation", signals.step, signals.step - steps + 1, text, False, values)
    return None


def _dead(signals: Signals) -> list[list[int]]:
    """Layer and number of each expert that died; biases need not have settled, for it had been met."""
    loads, found = signals.loads, list[list[int]]()
    for layer, (silent, had) in enumerate(zip(loads.silent, loads.had, strict=True)):
        least = max(DIES, math.ceil(EXPECTED * len(silent) / signals.facts.assignments))
        found += [[layer, e] for e, steps in enumerate(silent) if steps >= least and had[e] >= STARVED]
    return found


def collapse(signals: Signals) -> Finding | None:
    """A layer that was even once gives nearly all to few, or nearly every token to one, for 120 steps; or its load has
    little entropy for 300."""
    loads = signals.loads
    for layer, (steps, once) in enumerate(zip(loads.few, loads.even, strict=True)):
        if once and steps >= FALLS and not loads.blocked:
            text = f"few experts of layer {layer}, which was even, get nearly all, for {steps} steps"
            layers = [at for at, lasts in enumerate(loads.few) if loads.even[at] and lasts >= FALLS]
            values = {"layer": layer, "layers": layers, "load": loads.last[layer], "threshold": FEW, "steps": steps}
            return Finding("collapse", signals.step, signals.step - steps + 1, text, False, values)
    if not loads.whole or not settled(signals):
        return None
    for layer, (load, steps) in enumerate(zip(loads.last, loads.narrow, strict=True)):
        even = entropy(load)
        if steps >= LASTS and max(load) - 1 > FLOORS * floor(len(load), _counted(signals)):
            text = f"the load of layer {layer} has {even:.2f} of an even one's entropy; the largest is {max(load):.2f}"
            values = {"layer": layer, "load": load, "entropy": even, "threshold": EVEN}
            return Finding("collapse", signals.step, signals.step - steps + 1, text, False, values)
    return None


def over_balance(signals: Signals) -> Finding | None:
    """Every layer more even than chance: the router spreads tokens, whatever they are."""
    loads, facts = signals.loads, signals.facts
    if len(loads.uneven) < BLOCKS or loads.blocked or not loads.layers:
        return None
    noise = min(floor(len(layer), BLOCK * facts.assignments / facts.routed) for layer in loads.layers)
    uneven = median(loads.uneven)
    if uneven >= FLAT * noise:
        return None
    text = f"the largest load is {uneven:.4f} above the mean where chance alone makes {noise:.4f}"
    values = {"maxvio": uneven, "floor": noise, "threshold": FLAT * noise}
    return Finding("over_balance", signals.step, signals.step - BLOCK * BLOCKS + 1, text, False, values)


def router_gradient(signals: Signals) -> Finding | None:
    """The routers get ten times the gradient that was usual, in the median of 20 steps: a loss of their own rules."""
    times, seen = signals.push.times(), signals.seen
    if seen is None or not signals.facts.top_k or times is None or times <= LEAVES:
        return None
    text = f"the routers get {times:.3g} times the gradient that they got"
    values = {"times": times, "grad_router": seen.grad_router, "grad_norm": seen.grad_norm, "threshold": LEAVES}
    return Finding("router_gradient", signals.step, signals.step - LATEST + 1, text, False, values)


def _counted(signals: Signals) -> float:
    """Assignments in the last window, at least."""
    return signals.loads.length * signals.facts.assignments
