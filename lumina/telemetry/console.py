"""The console: a listener that prints one readable line for what matters and stays quiet about the rest.

On a terminal one more line, at the bottom and always replaced, says what is going on right now. Anywhere else (a pipe,
a file, TERM=dumb) there are only whole lines, without carriage returns and colours.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from rich.console import Console as Terminal
from rich.live import Live
from rich.text import Text

from lumina.standard import lasting
from lumina.telemetry import incidents
from lumina.telemetry.figures import count, duration, perplexity, size
from lumina.telemetry.forecasts import Forecasts

Event = dict[str, Any]
Show = Callable[[str], None]

LONG = 2.0  # seconds after which a person at a terminal wants to know how far it is
LONG_IN_A_LOG = 10.0  # and after which it is worth a line in a log
REFRESH = 0.2  # seconds between two drawings of the status line
BAR = 24  # characters

# What a decision says, by rule and action.
SENTENCES = {
    ("non_finite", "skip_step"): "loss {loss:.4g} or gradient norm {grad_norm:.4g} is not finite; no weight was moved",
    (
        "overflow",
        "skip_step",
    ): "fp16 gradients overflowed; no weight was moved, the loss scale is halved to {halved_to:g}",
}


def step_line(event: Event, remaining: float | None) -> str:
    """The line of one training step."""
    loss = event["loss"]
    parts = [
        f"[Step {event['step']}] Loss: {loss:.3f}",
        f"Perplexity: {perplexity(loss)}",
        f"Accuracy: {100 * event['acc']:.1f}%",
        f"lr {event['lr']:.1e}".replace("e-0", "e-"),
        f"gnorm {event['grad_norm']:.2f}",
        f"{count(event['tok_s'])} tok/s",
        f"MFU {100 * event['mfu']:.0f}%",
        size(event["mem"]),
    ]
    if event["bal"] is not None:
        parts.append(f"bal {event['bal']:.2f}")
    if remaining is not None:
        parts.append(f"ETA {duration(remaining)}")
    return " | ".join(parts)


def status_line(event: Event, steps: int, remaining: float | None) -> str:
    """Where the run stands right now, short enough for a terminal."""
    parts = [f"{event['step'] / steps:.0%}", f"step {event['step']} of {steps}", f"loss {event['loss']:.3f}"]
    parts += [f"{count(event['tok_s'])} tok/s", f"MFU {100 * event['mfu']:.0f}%"]
    return " · ".join(parts if remaining is None else [*parts, f"ETA {duration(remaining)}"])


def data_lines(data: dict[str, Any]) -> list[str]:
    """What the data is made of, where there is more to say than its size."""
    lines = []
    if len(data["sources"]) > 1 or data["sources"][0]["kind"] == "chat":
        for source in data["sources"]:
            weight = f", weight {source['weight']:g}" if "weight" in source else ""
            one = "" if source["documents"] == 1 else "s"
            formats = f" ({', '.join(source['formats'])})" if source["kind"] == "chat" else ""
            things = f"{'conversation' if source['kind'] == 'chat' else 'text'}{one}{formats}"
            lines.append(
                f"       {source['name']}: {source['documents']:,} {things}, {count(source['tokens'])} tokens{weight}"
            )
    if data["padding"] >= 0.001 or "answers" in data:
        answers = f"; {data['answers']:.0%} of the conversations' tokens are answers" if "answers" in data else ""
        lines.append(f"       {data['windows']:,} windows, {data['padding']:.1%} padding{answers}")
    for side, held in (("", ""), ("heldout_", " held-out")):
        overlong, pieces, lost_tokens = (data.get(f"{side}{name}", 0) for name in ("overlong", "pieces", "lost_tokens"))
        if overlong:
            lost = f" at turns, {count(lost_tokens)} tokens fit nowhere" if lost_tokens else " at turns"
            lines.append(f"! {overlong}{held} conversations are longer than a window: cut into {pieces}{lost}")
    for reason, removed in data.get("removed", {}).items():
        if removed["documents"]:
            lines.append(f"       removed: {removed['documents']:,} documents, {size(removed['bytes'])}, {reason}")
    lines += [f"! left out: {problem}" for problem in data["skipped"]]
    if data["empty"]:
        lines.append(f"       {data['empty']:,} documents are empty")
    lines += [
        f"! {path} changed since these shards were prepared; prepare them again to use it" for path in data["changed"]
    ]
    return lines


def length_lines(event: Event) -> list[str]:
    """Why the run is so long, if that was chosen, and what text that is read more than once is worth."""
    lines = [f"       steps {event['steps']}: {why}"] if (why := event["choices"].get("train.steps")) else []
    read = event.get("epochs", {"epochs": 0, "warnings": []})
    if read["epochs"] > 1 and not read["warnings"]:
        lines.append(f"       {read['epochs']:.2g} epochs: a token is worth {read['worth']:.0%} of a fresh one")
    return lines + [f"! {line}" for line in read["warnings"]]


def disk_lines(disk: dict[str, Any], why: str) -> list[str]:
    """How often a run saves (`why`, if that was chosen), and what its checkpoints take beside the room there is."""
    total = disk["most"] * disk["bytes"]
    several = f"{disk['most']} x {size(disk['bytes'])} = {size(total)}" if disk["most"] > 1 else size(total)
    several += f" ({disk['pinned']} to undo overlays)" if disk["pinned"] else ""
    every = f"a checkpoint every {disk['every']} steps" if disk["every"] else "one checkpoint, at the end"
    lines = [f"disk   {every}, at most {several} at a time; {size(disk['free'])} are free"]
    lines += [f"       checkpoint.every {disk['every']}: {why}"] if why else []
    if total > disk["used"] + disk["free"]:
        lines.append("! the checkpoints will not all fit: free space on the disk, or keep fewer (checkpoint.keep_last)")
    return lines


class Console:
    """Prints events as they come, and keeps the same lines in the run's `log.txt`.

    A step is printed every `log_every` steps, and the first and the last; what is `quiet` prints problems only. It is a
    context: leaving it takes the status line away, however the run ended.
    """

    def __init__(self, log_every: int = 10, show: Show | None = None, quiet: bool = False) -> None:
        self.log_every, self.quiet = log_every, quiet
        self.screen = Screen() if show is None else None
        self.show = self.screen.print if self.screen else show
        self.long = Long(self.screen)
        self.log: Path | None = None
        self.steps = 0
        self.unsaved = False
        self.step_time: float | None = None
        self.last: tuple[int, float] | None = None
        self.forecasts = Forecasts()

    def __call__(self, event: Event) -> None:
        handler = getattr(self, f"_on_{event['t']}", None)
        if handler is not None:
            handler(event)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.status("")

    def progress(self, what: str, done: int, total: int) -> None:
        """How far something long has come; see `lumina.progress`."""
        if not self.quiet:
            self.long(what, done, total)

    def status(self, line: str) -> None:
        """Replaces the line at the bottom of a terminal; an empty one takes it away."""
        if self.screen and not self.quiet:
            self.screen.status(line)

    def write(self, line: str) -> None:
        if self.show and (not self.quiet or line.startswith("!")):
            self.show(line)
        if self.log is None:
            return
        try:
            with self.log.open("a", encoding="utf-8") as log:
                log.write(line + "\n")
        except OSError as error:  # a copy for reading is not worth a run
            path, self.log = self.log, None
            self.write(f"! {path} is no longer written: {error.strerror}")

    def _on_run(self, event: Event) -> None:
        self.log = Path(event["path"]) / "log.txt"
        self.steps = event["ends"] if "ends" in event else event["steps"]
        mean = "" if event["active_mean"] == event["active"] else f" ({count(event['active_mean'])} on average)"
        data, tokens = event["data"], event["steps"] * event["batch_tokens"]
        resumed = event.get("parent_step") is not None
        for name, reason in event["skipped_checkpoints"]:
            self.write(f"! skipped {name}: {reason}")
        how = "back  " if event.get("reason") == "rollback" else "resume"
        self.write(f"{how} {event['path']} from step {event['step']}" if resumed else f"run    {event['path']}")
        for key, (old, new) in event.get("changed", {}).items():
            self.write(f"       {key} is {new} from here on, it was {old}")
        for one in event.get("overlays", []):
            until = "" if one["end"] is None else f" to {one['end']}"
            self.write(f"       {one['key']}={one['value']} from step {one['begin']}{until}")
        self.write(
            f"model  {event['kind']}, {count(event['params'])} parameters, "
            f"{count(event['active'])} active a token{mean}, {count(event['flops_per_token'])}FLOP a trained token"
        )
        self.write(
            f"data   {count(data['tokens']['train'])} tokens to train on, {count(data['tokens']['heldout'])} held out, "
            f"{data['bytes_per_token']:.2f} bytes a token, loader {count(event['loader_tok_s'])} tok/s"
        )
        if event["lora"]:
            self.write(f"       adapters of rank {event['lora']}: {count(event['trained'])} parameters are trained")
            if not event["init_from"]:
                self.write("! the weights below the adapters were never trained: train.init_from=RUN begins with some")
        for line in data_lines(data):
            self.write(line)
        if data["ignored_files"]:
            files = "1 file was" if data["ignored_files"] == 1 else f"{data['ignored_files']} files were"
            self.write(f"! {files} passed over: not named as text, JSON or parquet is")
        if data.get("eval_in_train"):
            self.write(
                f"! {data['eval_in_train']} of {data['documents']['heldout']} held-out documents are in the training "
                "data too: their loss shows memory"
            )
        if data.get("rebuilt"):
            self.write(f"! the token cache was damaged and is rebuilt: {data['rebuilt']}")
        processes = f"{event['processes']} processes of " if event["processes"] > 1 else ""
        threads = "thread" if event["threads"] == 1 else "threads"
        same = event["precision"].removesuffix("_pure") == event["precision_eval"]
        evaluated = "" if same else f" (evaluated in {event['precision_eval']})"
        self.write(
            f"here   {event['machine']['device_name']} ({event['device']}), {processes}{event['threads']} {threads}, "
            f"{event['precision']}{evaluated}, matmul {count(event['matmul_flops'])}FLOP/s"
        )
        if why := event["choices"].get("train.compile"):
            self.write(f"       compile {event['compile']}: {why}")
        self.write(
            f"plan   {event['steps']} step{'s' * (event['steps'] > 1)} of {count(event['batch_tokens'])} tokens = "
            f"{count(tokens)} tokens, {tokens / data['tokens']['train']:.2g} passes over the data"
        )
        for line in length_lines(event):
            self.write(line)
        for line in disk_lines(event["disk"], event["choices"].get("checkpoint.every", "")):
            self.write(line)

    def _on_step(self, event: Event) -> None:
        step = event["step"]
        self._track(step, event["wall"])
        remaining = None if self.step_time is None else self.step_time * (self.steps - step)
        self.status(status_line(event, self.steps, remaining) if step < self.steps else "")
        if step % self.log_every == 0 or step in (1, self.steps):
            self.write(step_line(event, remaining))

    def _track(self, step: int, wall: float) -> None:
        """A moving average of the step time, for the ETA."""
        if self.last is not None and step > self.last[0]:
            seconds = (wall - self.last[1]) / (step - self.last[0])
            self.step_time = seconds if self.step_time is None else 0.9 * self.step_time + 0.1 * seconds
        self.last = step, wall

    def _on_eval(self, event: Event) -> None:
        depth = event["mod_capacity"]
        taken = f" | depth {sum(depth) / len(depth):.3f}" if depth else ""
        warning = "" if event["comparable"] else " | NOT COMPARABLE: realised depth capacity is off its target"
        which = "" if event["split"] == "heldout" else f" ({event['data']})"
        self.write(
            f"[Eval {event['step']}]{which} Loss: {event['loss']:.3f} | Perplexity: {perplexity(event['loss'])} | "
            f"Accuracy: {100 * event['acc']:.1f}% | {event['bpb']:.3f} bits per byte over "
            f"{count(event['heldout_tokens'])} held-out tokens, causal{taken} | {duration(event['seconds'])}{warning}"
        )

    def _on_forecast(self, event: Event) -> None:
        for line in self.forecasts.lines(event, self.steps, self.step_time):
            self.write(line)

    def _on_phase(self, event: Event) -> None:
        reads = {"text": "texts", "chat": "conversations", "both": "texts and conversations"}[event["data"]]
        self.write(
            f"[Phase {event['phase']} of {event['of']}] {count(event['steps'])} steps of {reads}, "
            f"peak lr {event['lr']:.1e}, warm-up {event['warmup']} steps".replace("e-0", "e-")
        )

    def _on_checkpoint(self, event: Event) -> None:
        self.unsaved = False
        asked = f", asked by {event['signal']}" if event.get("signal") else ""
        steps = event.get("stall_steps")
        worth = "" if steps is None else f" ({steps:.1f} steps)"
        self.write(
            f"[Save {event['step']}] {size(event['bytes'])} | steps waited {event['stall']:.2f}s{worth} | "
            f"on disk after {event['seconds']:.2f}s ({size(event['bandwidth'])}/s, {event['way']}){asked}"
        )
        for problem in event.get("problems", []):
            self.write(f"! checkpoint of step {event['step']}: {problem}")

    def _on_incident(self, event: Event) -> None:
        if event["kind"] == "act refused":  # it may have changed the end before it failed
            self.steps = int(event.get("ends", self.steps))
        if event["kind"] != "save refused" or not self.unsaved:
            self.write(f"! {incidents.sentence(event)}")
        self.unsaved |= event["kind"] == "save refused"  # said once, until a save succeeds

    def _on_decision(self, event: Event) -> None:
        self.steps = int(event.get("ends", self.steps))
        said = SENTENCES.get((event["rule"], event["action"]))
        reason = f"{event['action']} ({event['rule']}) {event.get('reason', '')}".rstrip()
        sentence = said.format(**event["evidence"]) if said else reason
        self.write(f"! step {event['step']}: {sentence}")

    def _on_trial(self, event: Event) -> None:
        """Only that it begins: what came of it is a decision, and until then nothing else is heard of the run."""
        if event["kind"] == "begin":
            asked = ", ".join(arm["asks"] for arm in event["arms"])
            how = f"{event['pairs']} pairs of {event['steps']} steps and a probe of {event['probe']}"
            cost = f"up to {event['cost']:,} steps' worth of compute, of {event['left']:,} left"
            self.write(f"! step {event['step']}: {event['rule']}; on trial: {asked}, in {how}: {cost}")

    def _on_end(self, event: Event) -> None:
        signal = f" by {event['signal']}" if event.get("signal") else ""
        self.status("")
        self.write(f"end    {event['reason']}{signal} at step {event['step']}, {time.strftime('%H:%M:%S')}")


class Long:
    """What takes longer than two seconds: a bar on a terminal; elsewhere, past ten, a line and one at its end.

    What is one whole, of which nothing is known before it is done, stands at the bottom of a terminal from its start.
    """

    def __init__(self, screen: Screen | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.screen, self.clock = screen, clock
        self.what, self.start, self.said = "", 0.0, False

    def __call__(self, what: str, done: int, total: int) -> None:
        now = self.clock()
        if what != self.what or done == 0:
            self.what, self.start, self.said = what, now, False
        seconds = now - self.start
        if self.screen and self.screen.live and total == 1:
            self.screen.status("" if done else f"{what} …")
            return
        if self.screen is None or seconds < (LONG if self.screen.live else LONG_IN_A_LOG):
            return
        if done >= total:
            self.what = ""
            if self.screen.live:
                self.screen.status("")
            else:
                self.screen.print(f"       {what}: done in {duration(seconds)}")
        elif self.screen.live:
            remaining = f"ETA {duration(seconds * (total - done) / done)}" if done else ""
            filled = round(BAR * done / total)
            self.screen.status(f"{what} {'━' * filled}{'─' * (BAR - filled)} {done / total:4.0%} {remaining}")
        elif not self.said:
            self.said = True
            self.screen.print(f"       {what} …")


class Screen:
    """Where lines go: standard output, with a status line below them if that is a terminal."""

    def __init__(self) -> None:
        self.terminal = _Terminal(soft_wrap=True, highlight=False)
        self.live = self.terminal.is_terminal and not self.terminal.is_dumb_terminal
        self._line: Live | None = None
        self._drawn = 0.0

    def print(self, line: str) -> None:
        with lasting(sys.stdout):
            self.terminal.print(Text(line, style=_style(line)), soft_wrap=True)

    def status(self, line: str) -> None:
        """Draws the status line, a few times a second at most and never wider than the terminal."""
        if not self.live or (line and self._line and time.monotonic() - self._drawn < REFRESH):
            return
        with lasting(sys.stdout):
            self._draw(line)

    def _draw(self, line: str) -> None:
        if not line:
            if self._line:
                self._line.stop()
            self._line = None
            return
        if self._line is None:
            self._line = Live(console=self.terminal, auto_refresh=False, transient=True, redirect_stderr=False)
            self._line.start()
        text = Text(line, style="dim", no_wrap=True, overflow="ellipsis")
        text.truncate(self.terminal.width - 1, overflow="ellipsis")
        self._line.update(text, refresh=True)
        self._drawn = time.monotonic()


def _style(line: str) -> str:
    """Colour for what a person looks for; rich leaves it out where it does not belong (NO_COLOR, a pipe)."""
    return "yellow" if line.startswith("!") else "cyan" if line.startswith("[Eval") else ""


class _Terminal(Terminal):
    def on_broken_pipe(self) -> None:
        """Leaves it to whoever prints."""
        raise
