"""What the gauntlet's runs came to, as tables for people and as plain values for programs."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

from lumina.bench.report import table
from lumina.events import as_plain
from lumina.verify.gauntlet.arms import KEYS, PRESET, STEPS, TOKENS, Result
from lumina.verify.gauntlet.cases import CASES, SOUND, SUITES, WITHIN, Suite
from lumina.verify.gauntlet.policies import POLICIES
from lumina.verify.gauntlet.scoring import (
    HURTS,
    SIGMAS,
    Measures,
    Score,
    Share,
    measures,
    regret,
    scores,
    sigmas,
    soon,
    sound,
    wilson,
)
from lumina.verify.report import about, circumstances

Table = tuple[list[str], list[list[str]]]

RUN = (
    f"A run is `{PRESET}`, {STEPS} steps of {TOKENS} tokens, WSD with a decay of 20 %, unless a case says otherwise. "
    "Every arm is forked from one healthy run of its kind, seed and settings, at the last restore point but one "
    f"(they are made every {KEYS['orchestrator.snapshot_every']} steps) before what is planted, from outside, in "
    "memory, at a step that the seed draws; a trap that is another run from its start on is taken from there. The "
    "orchestrator cannot see what it is. Losses are final, causal and held-out."
)
MEANING = {
    "sigma": "the standard deviation of the final losses of healthy runs of that kind and these settings, over seeds.",
    "above healthy": "above the healthy run of the same seed, for each seed, in sigma, and the most in nats; inf: it "
    "was stopped, crashed while it was watched, or is not finite.",
    "alone": f"the same of the run that nobody watched. A fault hurts a run if that is more than {HURTS:g}.",
    "harmless": f"a fault that alone is not above {HURTS:g} on average over seeds. To act on it is no rescue, and by "
    "the letter a false intervention: healthy runs that were acted on are counted without such faults, and with them.",
    "set right": "with a right diagnosis, and within the same bound as what is rescued.",
    "rescued": f"of the runs that are hurt, how many ended at most {SIGMAS:g} above; of shifted targets, which "
    "nothing mends, how many were stopped with a right diagnosis.",
    "avoided": "1 - above / alone, median of the runs that are hurt.",
    "heard, acted on": "steps from the fault to the first decision about it, and to the first that did something, "
    "medians.",
    "diagnosed": "the causes that were named, of the decision that was acted on if there was one.",
    "done": "what changed the run, without what the guard skipped.",
    "something won": "runs in which an intervention won a trial and was kept.",
    "cost, trials": "what trials took, evaluations included, probations not, over the steps of the run.",
    "steps beyond": "all that was computed beyond the run's own steps, over these: replays, trials, probations, and "
    "steps taken again.",
    "left alone": "nothing was done, and the run is to the bit (loss and gradient norm of every step) the one that "
    "nobody watched; of what was done by hand and undone, the healthy one.",
}


def faults(found: Sequence[Score]) -> Table:
    """Of each fault, kind and mode."""
    rows = []
    for one in found:
        if one.case.fault:
            avoided = f"{statistics.median(one.avoided):.3f}" if one.avoided and not one.case.stops else "-"
            causes = ", ".join(f"{cause or 'none'} {n}" for cause, n in Counter(one.causes).items())
            right = f"{one.right} of {len(one.causes)}"
            known = not any(map(math.isnan, one.excess))
            within = f"{sum(value <= SIGMAS for value in one.excess)} of {len(one.runs)}" if known else "-"
            most = f"{max(one.nats):.4f}" if not any(map(math.isnan, one.nats)) else "-"
            hurt = f"{sum(one.rescued)} of {len(one.rescued)}"
            cells = [_sigmas(one.excess), most, within, _sigmas(one.away), hurt, avoided]
            said = [_median(one.delays), _median([run.met for run in one.runs if run.met is not None]), causes, right]
            said = said if all(run.told for run in one.runs) else ["-"] * len(said)
            rows.append([one.case.name, one.kind, one.mode, *cells, *said, _done(one)])
    header = ["fault", "kind", "mode", "above healthy, sigma", "most, nats", f"within {SIGMAS:g} sigma", "alone, sigma"]
    return [*header, "rescued", "avoided", "heard", "acted on", "diagnosed", "right", "done"], rows


def traps(found: Sequence[Score]) -> Table:
    """Of each trap, kind and mode."""
    rows = []
    for one in found:
        if not one.case.fault:
            known = [good for good in one.good if good is not None]
            left = f"{sum(known)} of {len(known)}" if known else "-"
            rows.append([one.case.name, one.kind, one.mode, left, _done(one)])
    return ["trap", "kind", "mode", "left alone", "done"], rows


def trials(found: Sequence[Score]) -> Table:
    """Of each case and kind for which something was tried."""
    rows = []
    for one in found:
        won, spent = [run.won for run in one.runs], [run.spent for run in one.runs]
        if any(spent) or one.refused:
            names = Counter(action for actions in won for action in actions)
            told = ", ".join(f"{action} {n}" for action, n in names.items()) or "nothing"
            rescued = sum(bool(good) for good, actions in zip(one.good, won, strict=True) if actions)
            cost = f"{100 * statistics.median(spent):.0f} % ({100 * max(spent):.0f})"
            cells = [f"{sum(map(bool, won))} of {len(won)}", told, str(rescued), cost, str(len(one.refused))]
            rows.append([one.case.name, one.kind, one.mode, *cells])
    return ["case", "kind", "mode", "something won", "what", "rescued by it", "cost, median (most)", "refused"], rows


def costs(found: Sequence[Score]) -> Table:
    """What it took to watch and to act, over the steps of the run, where it took anything."""
    rows = []
    for one in found:
        runs = [run for run in one.runs if run.extra is not None]
        extra, spent = [run.extra or 0.0 for run in runs], [run.spent for run in runs]
        if any(extra) or (runs and not SUITES[one.runs[0].arm.suite].alone):
            steps = f"{max(run.steps for run in one.runs):,}"
            cells = [f"{100 * statistics.median(values):.2f} % ({100 * max(values):.2f})" for values in (spent, extra)]
            rows.append([one.case.name, one.kind, one.mode, steps, *cells, _done(one)])
    return ["case", "kind", "mode", "steps", "trials, median (most)", "steps beyond, median (most)", "done"], rows


def watchers(found: Sequence[Score]) -> Table:
    """Of each mode, and of nobody, all measures; over what all of them watched, so that they can be compared."""
    modes = list(dict.fromkeys(one.mode for one in found))
    seeds = [{run.arm.run for one in found if one.mode == mode for run in one.runs} for mode in modes]
    shown = set.intersection(*seeds) if seeds else set()
    rows = []
    for one in measures([part for one in found if (part := _only(one, shown)).runs]):
        avoided = "-" if one.avoided is None else f"{one.avoided:.3f}"
        cost = f"{100 * statistics.median(one.extra):.0f} %" if one.extra else "-"
        rows.append([one.mode, _share(one.rescued), avoided, _share(one.stopped), _share(one.touched), cost])
    header = ["who", "rescued", "avoided, median", "stopped rightly", "healthy runs acted on", "steps beyond, median"]
    return header, rows


def _only(one: Score, shown: set[tuple[str, str, int]]) -> Score:
    """A score of those runs alone."""
    keep = [run.arm.run in shown for run in one.runs]
    runs, alone = list(compress(one.runs, keep)), list(compress(one.alone, keep))
    return replace(one, runs=runs, alone=alone, healthy=list(compress(one.healthy, keep)))


def latencies(found: Sequence[Score]) -> Table:
    """Of faults that hurt."""
    rows = []
    for one in measures(found):
        for heard, delays in one.delays.items():
            figures = [f"{statistics.median(delays):g}", f"{max(delays):g}"]
            rows.append([heard, one.mode, str(WITHIN[heard]), _of(soon(one, heard)), *figures])
    return ["kind of fault", "mode", "has to be heard within", "was", "median", "most"], rows


def judged(found: Sequence[Score]) -> list[str]:
    """The modes that the bars are for: not those that are there to be compared with."""
    return [mode for mode in dict.fromkeys(one.mode for one in found) if mode not in (*POLICIES, "off", "advise")]


def bars(found: Sequence[Score], mode: str = "act") -> Table:
    """What is asked of who watches, and what it came to."""
    mine = next((one for one in measures(found) if one.mode == mode), None)
    if mine is None:
        return [], []
    touched, by_letter = mine.touched, mine.by_letter
    rows = [
        ["rescued", ">= 90 % of at least 60", _share(mine.rescued), _met(mine.rescued, 0.9, 60)],
        _above_others(found, mode),
        ["damage avoided, median", ">= 0.9", _figure(mine.avoided), _yes((mine.avoided or 0) >= 0.9)],
        ["stopped rightly", "all", _share(mine.stopped), _met(mine.stopped, 1.0, 1)],
        ["healthy runs acted on", "0 of at least 60", _share(touched), _yes(not touched[0] and touched[1] >= 60)],
    ]
    if by_letter != touched:
        told = "the same, harmless faults among them"
        rows.append([told, "0 of at least 60", _share(by_letter), _yes(not by_letter[0] and by_letter[1] >= 60)])
        rows.append(["those set right", "all", _share(mine.restored), _met(mine.restored, 1.0, 1)])
    rows += [
        ["traps to the bit", "all", _share(mine.exact), _met(mine.exact, 1.0, 1)],
        ["trials in traps that kept something", "0", _share(mine.kept), _yes(not mine.kept[0])],
        ["right diagnoses", ">= 80 %", _share(mine.right), _met(mine.right, 0.8, 1)],
    ]
    for heard, within in WITHIN.items():
        delays, share = mine.delays.get(heard), soon(mine, heard)
        told = f"{_of(share)}, most {max(delays):g}" if delays else "-"
        rows.append([f"heard, {heard}", f"<= {within} steps", told, _met(share, 1.0, 1)])
    known = regret(found, mode)
    mean = statistics.fmean(known.against) if known else 0.0
    told = f"{mean:.2f} in the mean, {max(known.against):.2f} at most" if known else "-"
    rows.append(
        [f"regret against {known.best if known else 'the best fixed policy'}, sigma", "<= 1", told, _yes(mean <= 1)]
    )
    rows += _cost_bars(found, mode)
    return ["measure", "bar", "is", "met"], [row if row[2] != "-" else [*row[:2], "not measured", "-"] for row in rows]


def _above_others(found: Sequence[Score], mode: str) -> list[str]:
    """The best of the other policies, on the runs that it was shown."""
    best: tuple[float, str, Share, Share] | None = None
    for other in measures(found):
        if other.mode != mode and other.rescued[1]:
            shown = {run.arm.run for one in found if one.mode == other.mode for run in one.runs}
            own = [part for one in found if one.mode == mode and (part := _only(one, shown)).runs]
            share = other.rescued[0] / other.rescued[1]
            if own and (best is None or share > best[0]):
                best = share, other.mode, other.rescued, measures(own)[0].rescued
    if best is None:
        return ["above the best other policy", "more", "-", "-"]
    _, name, theirs, own_share = best
    told = f"{_of(own_share)} against {_of(theirs)}"
    return [f"above the best other, {name}", "more", told, _yes(own_share[0] * theirs[1] > theirs[0] * own_share[1])]


def _cost_bars(found: Sequence[Score], mode: str) -> list[list[str]]:
    """Where runs are long enough that what a trial costs is judged."""
    rows = []
    for fault, most in ((True, 0.05), (False, 0.005)):
        mine = [run for one in found if one.mode == mode and one.case.fault == fault for run in one.runs]
        extra = [run.extra for run in mine if run.extra is not None and not SUITES[run.arm.suite].alone]
        what, told = "steps beyond, long runs, " + ("broken" if fault else "healthy"), "-"
        if extra:
            told = f"{100 * max(extra):.2f} % at most, {len(extra)} runs"
        rows.append([what, f"<= {100 * most:g} %", told, _yes(max(extra, default=0.0) <= most)])
    return rows


def _met(share: Share, least: float, of: int) -> str:
    return _yes(share[1] >= of and share[0] >= least * share[1])


def _yes(met: bool) -> str:
    return "yes" if met else "no"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def confusion(found: Sequence[Score], mode: str = "act") -> Table:
    """Right causes against the named ones, of faults that hurt."""
    named = next((one.named for one in measures(found) if one.mode == mode), {})
    columns = sorted({cause for _, cause in named})
    rows = [
        [right, *(str(named.get((right, cause), "")) for cause in columns)] for right in sorted({r for r, _ in named})
    ]
    return ["right", *columns], rows


def page(
    results: Sequence[Result], command: str, calibration: str = "", taken: Sequence[Mapping[str, Any]] | None = None
) -> str:
    """The dated report. `calibration` says where the runs alone are from, if not taken with the others; `taken` when
    and where these were, if not here and now: what is ours is told of our runs alone."""
    found, runs = scores(results), sound(results)
    spread = ", ".join(f"{' '.join(of)} {value:.4f} ({len(runs[of])} runs)" for of, value in sigmas(results).items())
    names = dict.fromkeys(result.arm.suite for result in results)
    title = "# The gauntlet" + "".join(f": {name}" for name in names)
    said = summary(found)
    ours = taken is None or any("lumina" in one for one in taken)
    suites = [SUITES[name] for name in names if ours]
    places = [circumstances()] if taken is None else list(dict.fromkeys(map(circumstances, taken)))
    lines = [title, "", *([f"**{said}**", ""] if said else []), *(f"{place}.  " for place in places if place), ""]
    lines += [RUN, ""] if ours else []
    lines += [f"The runs: {suite.text}{_keys(suite)}." for suite in suites]
    lines += ["", calibration] if calibration else []
    lines += ["", f"Sigma, nats: {spread}.", ""] if spread else [""]
    hours = sum(result.seconds for result in results) / 3600
    took = f" Together they took {hours:.1f} hours of one core, without the healthy beginnings." if hours >= 0.1 else ""
    raw = "the file beside this" if taken is None else "these files"
    lines += [f"    {command}", "", f"Raw: every run is a line of {raw}.{took}"]
    planted = ["", "## What was planted", ""] if ours else []
    for name in dict.fromkeys(result.arm.case for result in results if result.arm.case not in SOUND):
        for suite in suites:
            planted += _told(name, suite)
    shown = [table(title, *made) for title, made in tables(found, results) if made[1]]
    meaning = ["", "## What the words mean", "", *(f"- *{word}*: {text}" for word, text in MEANING.items())]
    return (
        "\n".join([*lines, *planted, *meaning])
        + "\n"
        + "".join(shown)
        + "".join(_regret(found, mode) for mode in judged(found))
        + _ended(results)
    )


def tables(found: Sequence[Score], results: Sequence[Result]) -> list[tuple[str, Table]]:
    """All tables, with their titles."""
    if not found:
        return [("Alone", unwatched(results))]
    modes = judged(found)
    made = [("Bars" + f" of `{mode}`" * (mode != "act"), bars(found, mode)) for mode in modes]
    made += [("Who watches", watchers(scores(results, alone=True))), ("Faults", faults(found))]
    made += [("Trials", trials(found)), ("Latency, steps", latencies(found))]
    made += [(f"Diagnoses of `{mode}`", confusion(found, mode)) for mode in modes]
    return [*made, ("Traps", traps(found)), ("Cost", costs(found))]


def unwatched(results: Sequence[Result]) -> Table:
    """The runs that nobody watched, where nobody watched any."""
    rows = []
    for one in scores(results, alone=True):
        if one.case.fault:
            counts = {True: "fault", False: "harmless", None: "?"}[one.hurts]
            hurt = f"{sum(one.hurt)} of {len(one.runs)}"
            rows.append([one.case.name, one.kind, _sigmas(one.away), hurt, counts])
    return ["fault", "kind", "above healthy, sigma", "hurt", "counts as"], rows


def _keys(suite: Suite) -> str:
    keys = dict(suite.keys) | {key: value for more in suite.of_kind.values() for key, value in more.items()}
    parts = [f"`{key}={value}`" for key, value in keys.items()]
    return "".join(f", {part}" for part in [*parts, f"seeds {', '.join(map(str, suite.seeds))} unless said otherwise"])


def _told(name: str, suite: Suite) -> list[str]:
    """What it is, when it begins, and what else is otherwise."""
    case = CASES[name]
    first = suite.late if case.late else suite.first
    begins = [f"from one of steps {first} to {first + suite.within - 1} on"] if case.plant and case.forked else []
    keys = [(key, value) for key, value in case.keys.items() if key not in suite.keys]  # the set's go before its own
    setting = "".join(f", {part}" for part in [*begins, *(f"`{key}={value}`" for key, value in keys)])
    causes = f" A right diagnosis: {' or '.join(sorted(case.causes))}." if case.fault else ""
    return [f"- **{case.name}**: {case.text.format(size=suite.size(case))}{setting}.{causes}"]


def _regret(found: Sequence[Score], mode: str) -> str:
    known = regret(found, mode)
    if known is None:
        return ""
    both = known.against, known.least
    parts = [f"{statistics.fmean(values):.2f} in the mean, {max(values):.2f} at most" for values in both]
    text = (
        f"`{mode}`, over {len(known.against)} runs that faults hurt and fixed policies were shown, excess in sigma "
        f"beyond that of the best fixed policy in hindsight ({known.best}): {parts[0]}. Beyond the best for each "
        f"single run: {parts[1]}."
    )
    return f"\n## Regret\n\n{text}\n"


def _ended(results: Sequence[Result]) -> str:
    """The runs that did not come to their end, or whose orchestrator did not."""
    bad = [(r, r.crashed or r.failed or r.stopped) for r in results]
    told = [f"- {r.arm.case}, {r.arm.kind}, seed {r.arm.seed}, {r.arm.mode}: {why}" for r, why in bad if why]
    return "\n".join(["", "## Stopped, failed or crashed", "", *told, ""]) if told else ""


def unknown(found: Sequence[Score]) -> str:
    """Of what nothing can be said: where too few healthy runs are there."""
    of = dict.fromkeys(f"{one.case.against} {one.kind}" for one in found if one.case.fault and not one.sigma > 0)
    return f"No sigma is known of {', '.join(of)}: it takes three healthy runs, of other seeds." if of else ""


def wrong(found: Sequence[Score]) -> list[str]:
    """The runs of who is judged that are not known to be as they have to be: rescued, stopped rightly, left alone."""
    mine = [one for one in found if one.mode in judged(found)]
    every = [(run.arm, good) for one in mine for run, good in zip(one.runs, one.good, strict=True)]
    return [f"{', '.join(map(str, arm.run))}, {arm.mode}" for arm, good in every if not good]


def summary(found: Sequence[Score]) -> str:
    """What each mode did that is judged, or if none is, each, with Wilson's 95 % intervals."""
    modes = judged(found) or [one.mode for one in found]
    parts = [part for one in measures(found) if one.mode in modes for part in _summary(one)]
    return "; ".join(parts) + "." if parts else ""


def _summary(one: Measures) -> list[str]:
    parts = []
    for what, share in (
        ("runs that faults hurt rescued", one.rescued),
        ("that nothing mends stopped with a right diagnosis", one.stopped),
        ("right diagnoses", one.right),
        ("harmless faults that were acted on set right", one.restored),
        ("healthy runs acted on", one.touched),
        ("traps left alone, to the bit", one.exact),
    ):
        if share[1]:
            parts.append(f"{one.mode}: {_share(share, what)}")
    if one.avoided is not None:
        parts.append(f"{one.mode}: {one.avoided:.3f} of the damage avoided in the median")
    return parts


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """Everything, each run's decisions included, as plain values."""
    found = scores(results)
    names = ("mode", "kind", "sigma", "excess", "nats", "away", "hurt", "hurts", "good", "avoided", "delays", "causes")
    made = {mode: bars(found, mode) for mode in judged(found)}
    known = {mode: regret(found, mode) for mode in made}
    named = {one.mode: [[*pair, count] for pair, count in one.named.items()] for one in measures(found)}
    plain: dict[str, Any] = as_plain(
        {
            "about": about(),
            "sigma": {" ".join(of): value for of, value in sigmas(results).items()},
            "scores": [
                {"case": one.case.name} | {name: getattr(one, name) for name in (*names, "right", "acted")}
                for one in found
            ],
            "measures": [vars(one) | {"named": named[one.mode]} for one in measures(found)],
            "bars": {
                mode: [dict(zip(header, row, strict=True)) for row in rows] for mode, (header, rows) in made.items()
            },
            "regret": {mode: dict(vars(one)) if one else None for mode, one in known.items()},
            "runs": [result.plain() for result in results],
        }
    )
    return plain


def _sigmas(values: Sequence[float]) -> str:
    return " ".join("-" if math.isnan(value) else f"{value:.1f}" for value in values)


def _of(share: Share) -> str:
    return f"{share[0]} of {share[1]}"


def _share(share: Share, what: str = "") -> str:
    if not share[1]:
        return "-"
    low, high = wilson(*share)
    return f"{_of(share)}{what and ' '}{what} ({100 * low:.0f} to {100 * high:.0f} %)"


def _median(steps: Sequence[float]) -> str:
    return f"{statistics.median(steps):g}" if steps else "-"


def _done(one: Score) -> str:
    return ", ".join(f"{action} {n}" for action, n in Counter(one.acted).items()) or "nothing"
