"""What was measured of memory, beside what the planner says today: the pages, and the bars they are held to."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from lumina.bench import allocator, resident, tracker
from lumina.bench.memory import earlier
from lumina.cli import main
from lumina.config.resolve import presets
from lumina.config.schema.model import KINDS
from lumina.errors import UserError

FOLDER = Path(__file__).parents[2] / "benchmarks" / "planner"


@pytest.mark.parametrize(("device", "meter"), [("cpu", resident), ("cuda", allocator), ("fake", tracker)])
def test_the_page_is_what_the_planner_says_today_beside_what_was_measured(device: str, meter: ModuleType) -> None:
    name = f"2026-11-26-memory-{device}"
    page, found = meter.beside(earlier(FOLDER / f"{name}.json", device))
    assert (FOLDER / f"{name}.md").read_text(encoding="utf-8") == page
    if device == "cuda":
        assert {case: one["forecast"]["peak"] / one["peak"] for case, one in found["cases"].items()} == {
            case: pytest.approx(1, abs=0.1) for case in allocator.CASES
        }
    elif device == "cpu":
        judged = {case: one["error"] for case, one in found["cases"].items() if one["used"] == "to judge"}
        assert judged == {case: pytest.approx(0, abs=0.15) for case in resident.JUDGING}
    else:
        assert {(one["preset"], one["kind"]) for one in found["cases"]} == {(p, k) for p in presets() for k in KINDS}
        assert all(one["error"] == pytest.approx(0, abs=0.05) for one in found["cases"])


def test_a_measurement_is_forecast_anew(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = FOLDER / "2026-11-26-memory-cuda.json"
    assert main(["bench", "memory", "--measured", str(path)]) == 0
    assert capsys.readouterr().out.strip() == path.with_suffix(".md").read_text(encoding="utf-8").strip()
    assert main(["bench", "memory", "--measured", str(path), "--case", "dense bf16"]) == 2
    assert "drop one of them" in capsys.readouterr().err
    for text in ("{", "[1]", '{"about": {}, "cases": {}}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(UserError, match="no measured memory"):
            earlier(tmp_path / "other.json", "cuda")
    with pytest.raises(UserError, match="cannot be read"):
        earlier(tmp_path / "nowhere.json", "cuda")
    with pytest.raises(UserError, match="measured otherwise") as other:
        earlier(path, "cpu")
    assert other.value.fix == "say so: --device cuda"
