"""The console: a listener that prints one readable line for what matters and stays quiet about the rest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console as Terminal
from rich.markup import escape

from lumina.telemetry.figures import count, duration, size

Event = dict[str, Any]

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
    perplexity = math.exp(min(loss, 700.0)) if math.isfinite(loss) else loss
    parts = [
        f"[Step {event['step']}] Loss: {loss:.3f}",
        f"Perplexity: {perplexity:.2f}",
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


class Console:
    """Prints events as they come, and keeps the same lines in the run's `log.txt`.

    A step is printed every `log_every` steps, and the first and the last.
    """

    def __init__(self, log_every: int = 10, write: Callable[[str], None] | None = None) -> None:
        self.log_every = log_every
        self.show = write or _terminal_writer()
        self.log: Path | None = None
        self.steps = 0
        self.step_time: float | None = None
        self.last: tuple[int, float] | None = None

    def __call__(self, event: Event) -> None:
        handler = getattr(self, f"_on_{event['t']}", None)
        if handler is not None:
            handler(event)

    def write(self, line: str) -> None:
        self.show(line)
        if self.log is None:
            return
        try:
            with self.log.open("a", encoding="utf-8") as log:
                log.write(line + "\n")
        except OSError as error:  # a copy for reading is not worth a run
            self.show(f"! {self.log} is no longer written: {error.strerror}")
            self.log = None

    def _on_run(self, event: Event) -> None:
        self.log = Path(event["path"]) / "log.txt"
        self.steps = event["steps"]
        mean = "" if event["active_mean"] == event["active"] else f" ({count(event['active_mean'])} on average)"
        data, tokens = event["data"], event["steps"] * event["batch_tokens"]
        resumed = event.get("parent_step") is not None
        for name, reason in event["skipped_checkpoints"]:
            self.write(f"! skipped {name}: {reason}")
        self.write(f"resume {event['path']} from step {event['step']}" if resumed else f"run    {event['path']}")
        self.write(
            f"model  {event['kind']}, {count(event['params'])} parameters, "
            f"{count(event['active'])} active a token{mean}, {count(event['flops_per_token'])}FLOP a trained token"
        )
        self.write(
            f"data   {count(data['tokens']['train'])} tokens to train on, {count(data['tokens']['heldout'])} held out, "
            f"{data['bytes_per_token']:.2f} bytes a token, loader {count(event['loader_tok_s'])} tok/s"
        )
        if data["ignored_files"]:
            self.write(f"! {data['ignored_files']} files were passed over: their names are not those of text")
        if data.get("eval_in_train"):
            self.write(
                f"! {data['eval_in_train']} of {data['documents']['heldout']} held-out documents are in the training "
                "data too: their loss shows memory"
            )
        if data.get("rebuilt"):
            self.write(f"! the token cache was damaged and is rebuilt: {data['rebuilt']}")
        self.write(
            f"here   {event['machine']['device_name']} ({event['device']}), {event['threads']} threads, "
            f"{event['precision']}, matmul {count(event['matmul_flops'])}FLOP/s"
        )
        self.write(
            f"plan   {event['steps']} steps of {count(event['batch_tokens'])} tokens = "
            f"{count(tokens)} tokens, {tokens / data['tokens']['train']:.2g} passes over the data"
        )

    def _on_step(self, event: Event) -> None:
        step = event["step"]
        self._track(step, event["wall"])
        if step % self.log_every and step not in (1, self.steps):
            return
        remaining = None if self.step_time is None else self.step_time * (self.steps - step)
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
        self.write(
            f"[Eval {event['step']}] Loss: {event['loss']:.3f} | Perplexity: {event['ppl']:.2f} | "
            f"Accuracy: {100 * event['acc']:.1f}% | {event['bpb']:.3f} bits per byte over "
            f"{count(event['heldout_tokens'])} held-out tokens, causal{taken} | {duration(event['seconds'])}{warning}"
        )

    def _on_checkpoint(self, event: Event) -> None:
        self.write(f"[Save {event['step']}] {size(event['bytes'])} in {event['seconds']:.2f}s")

    def _on_decision(self, event: Event) -> None:
        sentence = SENTENCES[event["rule"], event["action"]].format(**event["evidence"])
        self.write(f"! step {event['step']}: {sentence}")

    def _on_end(self, event: Event) -> None:
        signal = f" by {event['signal']}" if event.get("signal") else ""
        self.write(f"end    {event['reason']}{signal} at step {event['step']}, {time.strftime('%H:%M:%S')}")


class _Terminal(Terminal):
    def on_broken_pipe(self) -> None:
        """Falls silent where rich would exit: a reader that goes away (`| head`) must not take the run along."""
        self.quiet = True


def _terminal_writer() -> Callable[[str], None]:
    terminal = _Terminal(soft_wrap=True, highlight=False)
    return lambda line: terminal.print(escape(line))
