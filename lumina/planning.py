"""The planner on this machine: what it is, what data there is, what was measured. No torch, unless a step is measured.

import lumina

plan = lumina.plan("b1", data="corpus/", time="24h", gpus="8xH100")
print(plan.loss.loss, plan.run.total)
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lumina.compat import usable_cores
from lumina.config import yaml12
from lumina.config.resolve import presets, resolve
from lumina.config.schema.config import Config
from lumina.data.amount import amount
from lumina.errors import UserError
from lumina.planner import calibration, time
from lumina.planner.calibration import Store
from lumina.planner.hardware import Fleet, cpu_name, known_as, parse_gpus, this_machine
from lumina.planner.plan import Data, Plan, make
from lumina.planner.question import Question, ask, key_of
from lumina.planner.solve import as_yaml
from lumina.progress import Tell, silent
from lumina.run import index
from lumina.run.folder import Run
from lumina.training.trial import measure_in_process

PRECISIONS = ("fp32", "bf16")
REMEASURED = 3  # times that a model which follows from its own step time may change


def plan(
    source: str | Path | None = None,
    settings: Sequence[str] | Mapping[str, Any] = (),
    *,
    data: str | Sequence[str] | None = None,
    gpus: str | None = None,
    measure: bool = False,
    progress: Tell = silent,
    **known: Any,
) -> Plan:
    """What a run will take and reach, before it begins.

    `source` is a preset or a YAML file, `settings` go over it; without one the model follows from what is known:
    `params`, `tokens`, `compute`, `time`, `budget` and `price`, `available` (tokens that differ), `inference`, `kind`,
    `law`, as numbers or as people write them. `gpus` such as 8xH100 stand for this machine; one that is not known takes
    `peak_tflops` and `mem`. `measure` times 20 real steps here and keeps the result. Raises `UserError` for anything
    wrong with the question.
    """
    written = _as_text(settings) + ([f"data.train={yaml12.dump_value(_listed(data))}"] if data is not None else [])
    question = ask(None if source is None else str(source), written, gpus=gpus, **known)
    if measure and gpus is not None:
        raise UserError("--measure times this machine, --gpus names another", fix="drop one of the two")
    store = calibration.load()
    config = _configured(question)
    named = None if gpus is None else parse_gpus(gpus, question.peak_tflops, question.memory)
    fleet = named or _here(config, store, measure)
    made = make(question, fleet, store, _data(question, config))
    for _ in range(REMEASURED):
        if not measure or made.step.measured:
            break
        store = _measured(made, store, progress)
        # By now the data is counted, and the rate of products known.
        made = make(question, _here(config, store, measure), store, _data(question, config))
    return replace(made, warnings=(*([store.problem] if store.problem else []), *made.warnings))


def run_called(source: str | None, root: Path) -> Run | None:
    """The run that is meant; None for a preset, a file or nothing. Raises `UserError` for a folder that is no run."""
    if source is None or source in presets() or source.endswith((".yaml", ".yml")):
        return None
    if Path(source).is_dir() or (root / source).is_dir() or os.sep in source:
        return index.find(root, source)
    return None


def require_alone(run: Run, given: Sequence[str]) -> None:
    """Raises `UserError` if something is asked beside a run, whose plan is made already."""
    if given:
        raise UserError(
            f"{', '.join(given)}: {run.path} is a run, held against the plan that it began with",
            fix=f"leave it out; a new plan of the same: lumina plan {shlex.quote(str(run.config))}",
        )


def configuration(made: Plan) -> str:
    """The YAML file that `lumina train` takes: the plan's preset and what differs, each with its reason."""
    return as_yaml(made.solved, f"{command(made.question)}; {made.tokens:.3g} tokens")


def write_configuration(text: str, path: Path) -> None:
    """Writes a configuration. Raises `UserError` if it is not called one, or cannot be written."""
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out {path}: a configuration's name ends in .yaml", fix=f"--out {path}.yaml")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error.strerror}", "give a path that can be") from error


def next_command(made: Plan, out: Path | None) -> str:
    """What starts the planned run, of the file if there is one; if it does not fit, the plan of one that does."""
    question = made.question
    if not made.memory.fits:
        return _other_plan(made)
    if out is not None:
        return start(made.fleet, [str(out)])
    if question.source is None:
        return f"{command(question)} --out plan.yaml && {start(made.fleet, ['plan.yaml'])}"
    said = resolve(question.source, question.every_setting).request
    own = {key: value for key, (value, _) in made.solved.changes.items() if said.get(key) != value}
    settings = [*question.every_setting, *(f"{key}={yaml12.dump_value(value)}" for key, value in own.items())]
    return start(made.fleet, [question.source, *settings])


def start(fleet: Fleet, arguments: Sequence[str]) -> str:
    """The command that trains on these devices; of several machines, on each of them."""
    train, machines = ["lumina", "train", *arguments], fleet.machines
    if fleet.count == 1:
        return shlex.join(train)
    if machines == 1:
        return shlex.join([*train, "--supervise", "--processes", str(fleet.count)])
    torchrun = f"torchrun --nnodes {machines} --nproc-per-node {fleet.count // machines} --rdzv-backend c10d"
    return f"{torchrun} --rdzv-endpoint HOST:29400 -m {shlex.join(train)}"


def command(question: Question) -> str:
    """The command line that asks this."""
    numbers = {
        "--params": question.params, "--tokens": question.tokens, "--compute": question.compute,
        "--budget": question.budget, "--price": question.price, "--tokens-available": question.available,
        "--inference-tokens": question.inference, "--peak-tflops": question.peak_tflops,
    }  # fmt: skip
    said = {name: f"{value:.12g}" for name, value in numbers.items() if value is not None}
    said |= {} if question.time is None else {"--time": f"{question.time:.12g}s"}
    said |= {} if question.memory is None else {"--mem": f"{question.memory / 2**20:.12g}MiB"}
    texts = {"--kind": question.kind, "--law": question.law, "--gpus": question.gpus}
    said |= {name: text for name, text in texts.items() if text is not None}
    options = [part for option in said.items() for part in option]
    return shlex.join(["lumina", "plan", *([question.source] if question.source else []), *question.settings, *options])


def _other_plan(made: Plan) -> str:
    """The plan with the first way to fit: another model by a setting, more GPUs, or a smaller preset."""
    question = made.question
    if not made.memory.remedies:
        return "lumina presets"  # which says what fits here
    first, *words = made.memory.remedies[0].split()
    if "=" in first:
        return command(_with(question, [first, *words]))
    if words[:1] == ["processes"]:
        return command(_with(replace(question, gpus=f"{first}x{made.fleet.device.name}"), words[1:]))
    length = None if any((question.compute, question.time, question.budget)) else question.tokens
    data = tuple(setting for setting in question.settings if setting.startswith("data."))
    other = replace(question, source=first, settings=data, params=None, tokens=length, kind=None)
    return command(_with(other, words))


def _with(question: Question, settings: Sequence[str]) -> Question:
    return replace(question, settings=replace(question, remedies=tuple(settings)).every_setting, kind=None)


def _configured(question: Question) -> Config:
    """Where it runs and what it reads; a model that is still to be found has that of any preset."""
    settings = question.every_setting
    if question.source is None:
        settings = tuple(setting for setting in settings if not setting.lstrip().startswith("model."))
    return resolve(question.source, settings).config


def _here(config: Config, store: Store, measure: bool) -> Fleet:
    """This machine, at the rates that were measured of its CPU, if any were; to `measure`, one device of it."""
    name = known_as("cpu", cpu_name(), usable_cores())
    rates = {mode: found[-1] for mode in PRECISIONS if (found := store.figures(f"matmul_{mode}", name))}
    fleet = this_machine(config.parallel.device, rates)
    return replace(fleet, count=1) if measure else fleet


def _data(question: Question, config: Config) -> Data | None:
    """What there is to read, as it was said or as the files have it."""
    chosen = "data.train" in map(key_of, question.every_setting) or config.data.train != ("sample",)
    if question.available is not None and not chosen:
        return Data(question.available, None, "as asked", counted=True)
    found = amount(config.data, config.model.vocab)
    if question.available is not None:
        return Data(question.available, found.heldout if found else None, "as asked", counted=True)
    return Data(found.train, found.heldout, found.how, found.counted, chosen) if found else None


def _measured(made: Plan, store: Store, progress: Tell) -> Store:
    """Times the plan's configuration in a process of its own, and keeps the result."""
    with tempfile.TemporaryDirectory(prefix="lumina-plan-") as folder:
        file = Path(folder) / f"{made.resolved.request['preset']}.yaml"
        file.write_text(as_yaml(made.solved, "measured"), encoding="utf-8")
        figures = measure_in_process(file, progress)
    rates = {mode: figures[name] for mode in PRECISIONS if (name := f"matmul_{mode}") in figures}
    forecast = time.step_time(made.config, this_machine(made.config.parallel.device, rates))  # as later ones will be
    figures[f"ratio_{forecast.bound}"] = figures["step"] / forecast.seconds.mid
    return calibration.record(made.fleet.device.name, made.config, made.fleet.count, figures, store.path)


def _as_text(settings: Sequence[str] | Mapping[str, Any]) -> list[str]:
    if isinstance(settings, Mapping):
        return [f"{key}={yaml12.dump_value(value)}" for key, value in settings.items()]
    return list(settings)


def _listed(data: str | Sequence[str]) -> list[str]:
    return [data] if isinstance(data, str) else list(data)
