"""A measurement as a table for people and as JSON for programs, side by side in a dated pair of files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lumina.bench.harness import COPY, MATMUL, TOTAL, Measurement, Ratio
from lumina.errors import UserError
from lumina.telemetry.figures import count, size

CONVENTION = (
    "Times are medians over rounds; ratios are medians of the ratios inside a round, with their 95 % interval "
    "(order statistics). MFU is counted FLOPs (6 a matmul parameter and trained token, causal attention as half "
    "of the square, routed blocks by capacity) over the square matmul of the same rounds."
)


def rows(measured: Measurement, base: str, parts: Sequence[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Header and one row an arm: time, parts, rate, rate relative to `base`, MFU, memory."""
    header = ["arm", "ms", *(f"{part}, ms" for part in parts), "rate", f"x {base}", "MFU", "memory"]
    unit = next(arm.unit for arm in measured.arms if arm.name == base)
    cells = []
    for arm in measured.arms:
        if arm.name in (MATMUL, COPY):
            continue
        seconds = measured.seconds[arm.name]
        cells.append(
            [
                arm.name,
                f"{1e3 * measured.median(arm.name):.1f}",
                *(f"{1e3 * measured.median(arm.name, part):.1f}" if part in seconds else "-" for part in parts),
                f"{count(measured.rate(arm.name))}{arm.unit}/s",
                speed(measured, arm.name, base) if arm.unit == unit else "-",
                between(measured.utilisation(arm.name), 100, "%") if arm.flops else "-",
                size(measured.memory[arm.name]) if arm.name in measured.memory else "-",
            ]
        )
    return header, cells


def speed(measured: Measurement, arm: str, base: str) -> str:
    """The arm's rate over the base's."""
    scale = measured.amount(arm) / measured.amount(base)
    ratio = measured.ratio(base, arm, TOTAL)
    return between(Ratio(*(scale * value for value in (ratio.median, ratio.low, ratio.high))))


def between(ratio: Ratio, scale: float = 1.0, unit: str = "") -> str:
    """`0.87 [0.85, 0.88]`"""
    digits = 2 if scale == 1 else 0
    middle, low, high = (f"{scale * value:.{digits}f}" for value in (ratio.median, ratio.low, ratio.high))
    return f"{middle}{unit} [{low}, {high}]"


def ceilings(measured: Measurement) -> str:
    """The machine's limits in one sentence."""
    return f"matmul {count(measured.rate(MATMUL))}FLOP/s, copy {size(measured.rate(COPY))}/s (read + written)"


def circumstances(about: Mapping[str, Any]) -> str:
    """Machine, versions, commit and date in one sentence."""
    return (
        f"{about['date']}, {about['device_name']} ({about['device']}, {about['threads']} threads), "
        f"lumina {about['lumina']} at {about['commit'] or 'no commit'}, torch {about['torch']}, "
        f"Python {about['python']}, {about['rounds']} rounds after {about['warm']}"
    )


def markdown(title: str, sections: Mapping[str, tuple[Measurement, str, Sequence[str]]]) -> str:
    """A page with one table a measurement: `{heading: (measured, base, parts)}`."""
    lines = [f"# {title}", "", CONVENTION]
    for heading, (measured, base, parts) in sections.items():
        said = f"{circumstances(measured.about)}; {ceilings(measured)}."
        lines.append(table(heading, *rows(measured, base, parts), said).rstrip("\n"))
    return "\n".join(lines) + "\n"


def table(heading: str, header: Sequence[str], cells: Sequence[Sequence[str]], said: str = "") -> str:
    """A section of a page: one table under a heading, and what is `said` of it first."""
    return "\n".join(["", f"## {heading}", "", *([said, ""] if said else [])]) + "\n" + plain(header, cells)


def plain(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """One table."""
    lines = [_row(header), _row(["---"] + ["---:"] * (len(header) - 1)), *map(_row, cells)]
    return "\n".join(lines) + "\n"


def write(folder: Path, name: str, page: str, measured: Mapping[str, Measurement]) -> Path:
    """`<folder>/<name>.md` and `.json`, with every single time; returns the page. Raises `UserError` if it cannot."""
    return write_pair(folder, name, page, {heading: one.as_json() for heading, one in measured.items()})


def write_pair(folder: Path, name: str, page: str, content: Mapping[str, Any]) -> Path:
    """`<folder>/<name>.md` and `.json`; returns the page. Raises `UserError` if it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        path = folder / f"{name}.md"
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}", fix="choose another folder") from error
    return path


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
