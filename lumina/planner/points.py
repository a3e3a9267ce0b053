"""Points that a law is fitted to: parameters, tokens and the loss in the end, from a file or from finished runs."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lumina.config.resolve import read
from lumina.config.schema.config import Config
from lumina.errors import UserError
from lumina.events import Event, merged, parse
from lumina.model import cost
from lumina.planner.traits import traits

COLUMNS = ("params", "tokens", "loss")
SHOWN = 10  # problems of a file
SAME = 0.02  # two sizes, or numbers of tokens, closer than that are one
RATIOS = (5, 20, 80)  # tokens a parameter of runs that are proposed
SMALL = 1e6  # parameters of the smallest of them, where nothing is known
REPEATS = 4  # epochs up to which repeated text is nearly as good as new (Muennighoff et al. 2023)
STEP = b'{"t":"step"'  # almost every line of a log, and nothing is wanted of it
NEEDED = ("config.yaml", "meta.json", "events.jsonl", "tokenizer/tokenizer.json")


class Point(NamedTuple):
    """Parameters, tokens, and the held-out loss in nats a token at the end of that run."""

    params: float
    tokens: float
    loss: float


class Runs(NamedTuple):
    """Points of runs; what they have in common; and sentences on runs left out, and on doubtful ones."""

    points: list[Point]
    traits: dict[str, str]
    left_out: list[str]
    warnings: list[str]


def read_points(path: Path) -> list[Point]:
    """Points of a CSV file with the columns params, tokens and loss, in any order.

    Raises `UserError` with all that is wrong, line by line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [(number, row) for number, row in enumerate(csv.reader(file), 1) if any(map(str.strip, row))]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", "name a CSV file, or folders of runs") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file: {error}", f"write {','.join(COLUMNS)} and a point a line") from None
    header = [cell.strip().lower() for cell in rows[0][1]] if rows else []
    if sorted(header) != sorted(COLUMNS):
        found = ", ".join(header) or "nothing"
        fix = f"write a first line {','.join(COLUMNS)}, and no other columns"
        raise UserError(f"{path}: needs the columns {', '.join(COLUMNS)}; its first line has {found}", fix)
    points, problems, seen = [], list[str](), dict[Point, int]()
    for number, row in rows[1:]:
        point = _point(dict(zip(header, row, strict=False)) if len(row) == len(header) else {})
        if isinstance(point, str):
            problems.append(f"{path}:{number}: {point}")
        elif point in seen:
            problems.append(f"{path}:{number}: the same as line {seen[point]}")
        else:
            seen[point] = number
            points.append(point)
    if problems:
        more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise UserError.collect([*problems[:SHOWN], *more], "points that cannot be used", "mend or delete these lines")
    return points


def _point(row: Mapping[str, str]) -> Point | str:
    """The point of a row, or what is wrong with it."""
    if not row:
        return f"needs {len(COLUMNS)} numbers"
    values = {}
    for name in COLUMNS:
        try:
            values[name] = float(row[name])
        except ValueError:
            return f"{name}={row[name].strip()!r} is not a number"
        if not 0 < values[name] < math.inf:
            return f"{name}={row[name].strip()} is not finite and positive"
    return Point(**values)


# -- runs -------------------------------------------------------------------------------------------------------------


def points_of(folders: Sequence[Path]) -> Runs:
    """One point of each finished run: parameters that a token meets (on average), tokens, the last held-out loss.

    Raises `UserError` if runs differ in what makes their losses, or laws, incomparable; says which, and where.
    """
    left_out, warnings, points, seen = list[str](), list[str](), list[Point](), set[Path]()
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for folder in folders:
        if not folder.exists():
            raise UserError(f"{folder}: no such folder", "name folders of runs, or a CSV file")
        if folder.resolve() in seen:
            left_out.append(f"{folder}: named twice")
            continue
        seen.add(folder.resolve())
        why, point = _look(folder, found, warnings)
        if point is None:
            left_out.append(f"{folder}: {why}")
        else:
            points.append(point)
    mixed = {name: values for name, values in found.items() if len(values) > 1}
    if mixed:
        problems = [
            f"{name}: " + "; ".join(f"{value} in {_few(names)}" for value, names in values.items())
            for name, values in mixed.items()
        ]
        fix = "give runs that agree in these, for no law goes through the others"
        raise UserError.collect(problems, "these runs differ in more than parameters and tokens", fix)
    return Runs(points, {name: next(iter(values)) for name, values in found.items()}, left_out, warnings)


def _look(folder: Path, found: dict[str, dict[str, list[str]]], warnings: list[str]) -> tuple[str, Point | None]:
    """The point of a run, or why it has none. What must be the same in all is added to `found`."""
    if lacking := [name for name in NEEDED if not (folder / name).is_file()]:
        return f"not a run: it has no {lacking[0]}", None
    config = read(folder / "config.yaml").config
    events = _events(folder / "events.jsonl")
    if not (events and events[-1]["t"] == "end" and events[-1].get("reason") == "done"):
        return "not finished", None
    if config.train.lora.rank or config.train.init_from:
        return "not trained from nothing, so that its tokens are not all it knows", None
    of = {event["t"]: event for event in events if event.get("split", "heldout") == "heldout"}
    begun, last = of.get("run", {}), of.get("eval")
    if last is None or last.get("step") != begun.get("steps"):
        return "not evaluated at its end", None
    if not last.get("comparable", True):
        return "its last evaluation is marked as not comparable", None
    point = Point(cost.count(config.model).active_mean, float(last["tokens"]), float(last["loss"]))
    if not math.isfinite(point.loss):
        return f"its loss is {point.loss}", None
    for name, value in _traits(folder, config).items():
        found[name][value].append(folder.name)
    warnings += _doubts(folder, point, begun, config)
    return "", point


def _events(log: Path) -> list[Event]:
    """All that counts, but the steps."""
    lines = (line for line in log.read_bytes().splitlines() if not line.startswith(STEP))
    return merged(event for line in lines if (event := parse(line)) is not None)


def _traits(folder: Path, config: Config) -> dict[str, str]:
    """What has to agree: where it does not, the loss is no function of parameters and tokens alone."""
    try:
        data = str(json.loads((folder / "meta.json").read_bytes())["data"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: its meta.json is damaged: {error}", "restore it, or leave out this run") from None
    made = (folder / "tokenizer/tokenizer.json").read_bytes()
    return {
        **traits(config),
        "tokenizer": hashlib.sha256(made).hexdigest()[:16],
        "data": data,
    }


def _doubts(folder: Path, point: Point, begun: Event, config: Config) -> list[str]:
    """What makes a run another than the law means."""
    doubts = []
    if (epochs := _epochs(point, begun)) > REPEATS:
        doubts.append(f"{folder}: read its text {epochs:.1f} times; the law means text that is read once")
    phases: list[dict[str, Any]] = begun.get("phases") or [{}]
    if config.train.schedule == "wsd" and phases[-1].get("decay") == 0:
        doubts.append(f"{folder}: its learning rate never decayed, so that its loss is not what it could end on")
    return doubts


def _epochs(point: Point, begun: Event) -> float:
    unique = begun.get("data", {}).get("tokens", {}).get("train")
    return point.tokens / unique if unique else 0.0


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# -- designs ----------------------------------------------------------------------------------------------------------


def count_duplicates(points: Sequence[Point]) -> int:
    """Points equal to an earlier one in all three numbers; equal sizes and tokens alone are another seed."""
    return len(points) - len(set(points))


def sizes_of(points: Iterable[Point]) -> dict[float, list[float]]:
    """For each size, from small to large, the numbers of tokens it was trained for; closer than 2 % is equal."""
    sizes: dict[float, list[float]] = {}
    for point in sorted(points):
        size = next((size for size in sizes if point.params <= size * (1 + SAME)), point.params)
        horizons = sizes.setdefault(size, [])
        if not any(abs(math.log(point.tokens / known)) < SAME for known in horizons):
            horizons.append(point.tokens)
    return sizes


def runs_to_make(sizes: Mapping[float, Sequence[float]]) -> list[str]:
    """The cheapest runs that are missing to 3 sizes at 3 numbers of tokens each, with what each costs."""
    chosen = sorted(sizes)[: len(RATIOS)] or [SMALL]
    while len(chosen) < len(RATIOS):
        chosen.append(2 * chosen[-1])
    lines = []
    for size in chosen:
        known = sizes.get(size, ())
        far = [r for r in RATIOS if not any(abs(math.log(r * size / tokens)) < math.log(2) for tokens in known)]
        for ratio in far[: max(0, len(RATIOS) - len(known))]:
            tokens = ratio * size
            lines.append(f"{size:.3g} parameters for {tokens:.3g} tokens: {6 * size * tokens:.2g} FLOPs")
    return lines
