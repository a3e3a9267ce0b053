"""The conversation in a terminal or a pipe: lines come in, answers stream out, commands begin with `/`."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lumina.checkpoint import store
from lumina.errors import UserError
from lumina.inference import engine
from lumina.inference.conversation import Answer, Conversation
from lumina.inference.engine import Model
from lumina.inference.sampler import Sampler
from lumina.model.cost import count, is_routed
from lumina.run.folder import Run

COMMANDS = {
    "/system": ("TEXT", "puts TEXT before the conversation, where it stays; without TEXT takes it away"),
    "/reset": ("", "forgets the conversation; settings and /system stay"),
    "/temp": ("X", "temperature; 0 is greedy"),
    "/topk": ("N", "samples among the N likeliest tokens; 0 is off"),
    "/topp": ("X", "samples among the likeliest tokens of this total probability; 1 is off"),
    "/stats": ("", "checkpoint, context, speed of the last answer, settings, cache"),
    "/save": ("FILE", "writes the transcript: JSON lines if FILE ends in .jsonl, else text"),
    "/reload": ("", "takes the newest checkpoint of the run; the conversation stays"),
    "/help": ("", "this list"),
    "/quit": ("", "leaves; ctrl-D does, too"),
}
OTHER_INPUT = (
    ("TEXT", "the model continues it, or answers it if it was trained on conversations"),
    ("(empty)", "the model goes on where it stopped"),
    ("//TEXT", "text that begins with /"),
    ("ctrl-C", "ends the answer only"),
)
NOT_TRAINED = "this model was not trained on conversations: it continues your text rather than answering it"
HOW_TO_LEAVE = "/quit or ctrl-D leaves"


class Chat:
    """Answers lines until there are no more, and says the rest through `say`, one call a line.

    `read` returns the next line without its end and raises `EOFError` after the last. `interactive`: a person is at
    the keyboard, whose interrupt ends the answer only.
    """

    def __init__(
        self,
        run: Run,
        conversation: Conversation,
        read: Callable[[], str],
        write: Callable[[str], object],
        say: Callable[[str], object],
        interactive: bool,
    ) -> None:
        self.run, self.conversation, self.interactive = run, conversation, interactive
        self.read, self.write, self.say = read, write, say
        self._told = False
        self._known = self._known_step()

    def loop(self) -> None:
        """Reads and answers until `/quit` or the end of the input. A mistake in a line is said and changes nothing."""
        for line in introduction(self.run, self.conversation.model):
            self.say(line)
        self.say(f"/help lists the commands; {HOW_TO_LEAVE}")
        going = True
        while going:
            try:
                self._tell_of_newer()
                going = self._take(self.read())
            except EOFError:
                going = False
                if self.interactive:
                    self.say("")  # ctrl-D leaves the cursor behind the prompt
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self.say(f"\n{HOW_TO_LEAVE}")

    def _take(self, line: str) -> bool:
        """Does what a line asks for; False for `/quit`."""
        name, _, argument = line.strip().partition(" ")
        try:
            if line.startswith("//"):
                self._answer(line[1:])
            elif line.startswith("/"):
                return self._command(name, argument.strip())
            else:
                self._answer(line)
        except UserError as error:
            self.say(f"{name}: {one_line(error)}" if name in COMMANDS else one_line(error))
        return True

    def _answer(self, line: str) -> None:
        try:
            answer = self.conversation.answer(line, self.write)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            self.say("\n(interrupted; what was written stays in the conversation)")
            return
        self.write("\n")
        for note in notes(answer, self.conversation):
            self.say(note)

    def _command(self, name: str, argument: str) -> bool:
        conversation = self.conversation
        match name:
            case "/system":
                conversation.set_system(argument)
                self.say("before the conversation now: " + (repr(argument) if argument else "nothing"))
            case "/reset":
                conversation.reset()
                self.say("the conversation is empty")
            case "/temp":
                self._sample(temperature=_number(argument))
            case "/topk":
                self._sample(top_k=_whole_number(argument))
            case "/topp":
                self._sample(top_p=_number(argument))
            case "/stats":
                for line in stats(self.run, conversation):
                    self.say(line)
            case "/save":
                self.say(f"wrote {save(conversation, argument)}")
            case "/reload":
                self._reload()
            case "/help":
                for line in help_lines():
                    self.say(line)
            case "/quit":
                return False
            case _:
                near = difflib.get_close_matches(name, COMMANDS, n=1)
                meant = f"did you mean {near[0]}?" if near else "/help lists them."
                self.say(f"{name}: no such command; {meant} Text that begins with / is written with //")
        return True

    def _sample(self, **setting: float) -> None:
        self.conversation.sampler = replace(self.conversation.sampler, **setting)  # type: ignore[arg-type]
        self.say(sampling(self.conversation.sampler))

    def _reload(self) -> None:
        before, self.conversation.model = self.conversation.model.step, engine.load(self.run)
        self._told = False
        self._known = self._known_step()
        model = self.conversation.model
        for reason in model.skipped:
            self.say(f"! skipped {reason}")
        self.say(f"step {model.step}" + (", as before" if model.step == before else f" instead of {before}"))

    def _known_step(self) -> int:
        """The step up to which checkpoints are no news: the loaded one's, or that of one passed over as damaged."""
        model = self.conversation.model
        return newest_step(self.run) if model.skipped else model.step

    def _tell_of_newer(self) -> None:
        """Says once, until the next reload, that a checkpoint has appeared since the last one."""
        step = newest_step(self.run)
        if step > self._known and not self._told:
            self._told = True
            self.say(f"the run has saved step {step}; /reload takes it")


def newest_step(run: Run) -> int:
    """The step of the newest checkpoint, unverified; -1 if there is none, or no folder that can be read."""
    try:
        return max(map(store.step_of, store.checkpoints(run.checkpoints)), default=-1)
    except OSError:
        return -1


def introduction(run: Run, model: Model) -> list[str]:
    """What was loaded, and what not to expect of it."""
    parameters = count(model.transformer.config).total
    skipped = [f"! skipped {reason}" for reason in model.skipped]
    loaded = f"step {model.step} of {run.path}, {parameters:,} parameters"
    return [*skipped, loaded] if model.talks else [*skipped, loaded, NOT_TRAINED]


def notes(answer: Answer, conversation: Conversation) -> list[str]:
    """What a person should know about an answer beside its text."""
    context = conversation.model.transformer.config.seq_len
    said = []
    if answer.left_out:
        room = context - answer.prompt_tokens
        said.append(
            f"(the context of {context} tokens is full: with {room} of them for the answer, "
            f"the oldest {answer.left_out} tokens were left out)"
        )
    if answer.reason == "context":
        said.append(f"(stopped: the context of {context} tokens is full; an empty line goes on)")
    if answer.reason == "end" and not conversation.model.talks:
        said.append("(the model ended its text)")
    return said


def stats(run: Run, conversation: Conversation) -> list[str]:
    """What is loaded, how full the context is, how fast the last answer was, and how the next one is sampled."""
    model, last = conversation.model, conversation.last
    config = model.transformer.config
    cost = count(config)
    ids, left_out = conversation.prompt(conversation.turns) if conversation.turns else ([], 0)
    lines = [
        f"model     step {model.step} of {run.path}: {config.kind}, {cost.total:,} parameters, {cost.active:,} active",
        f"context   {len(ids)} of {config.seq_len} tokens; {left_out} older ones are left out",
        f"sampling  {sampling(conversation.sampler)}, at most {conversation.max_tokens} tokens an answer",
    ]
    if last is None:
        return [*lines, "answer    none yet"]
    speed = f", {last.tokens / last.seconds:.1f} tokens/s" if last.tokens else ""
    lines.append(f"answer    {last.tokens} tokens in {last.seconds:.2f} s{speed}, {last.prompt_tokens} read before")
    kinds: dict[str, list[int]] = {"full": [], "routed": []}
    for layer, entries in enumerate(last.cache_entries):
        kinds["routed" if is_routed(config, layer) else "full"].append(entries)
    of = [f"{sum(n) / len(n):.1f} in each of {len(n)} {kind} blocks" for kind, n in kinds.items() if n]
    return [*lines, f"cache     of that answer, tokens stored: {', '.join(of)}"]


def sampling(sampler: Sampler) -> str:
    return f"temperature {sampler.temperature:g}, top_k {sampler.top_k}, top_p {sampler.top_p:g}"


def help_lines() -> list[str]:
    rows = [(f"{name} {argument}", meaning) for name, (argument, meaning) in COMMANDS.items()]
    return [f"  {what:<14}{meaning}" for what, meaning in (*OTHER_INPUT, *rows)]


def save(conversation: Conversation, name: str) -> Path:
    """Writes the transcript to a new file. Raises `UserError`, leaving nothing behind, if that cannot be done."""
    if not name:
        raise UserError("a file name is missing", fix="/save FILE")
    path = Path(os.path.expanduser(name))
    if path.suffix == ".jsonl":
        content = "".join(json.dumps(message, ensure_ascii=False) + "\n" for message in conversation.messages())
    else:
        content = conversation.transcript()
    try:
        file = path.open("x", encoding="utf-8", newline="")
    except FileExistsError:
        raise UserError(f"{path} exists already", fix="give another name") from None
    except (OSError, ValueError) as error:
        raise _not_written(path, error) from None
    try:
        with file:
            file.write(content)
    except OSError as error:
        path.unlink()
        raise _not_written(path, error) from None
    return path


def one_line(error: UserError) -> str:
    """A message, and what to do, as one line."""
    message = " ".join(line.lstrip(" -") for line in error.message.splitlines())
    return f"{message}; {error.fix}" if error.fix else message


def _not_written(path: Path, error: OSError | ValueError) -> UserError:
    reason = error.strerror if isinstance(error, OSError) else error
    return UserError(f"{path} was not written: {reason}", fix="give a name in a folder that takes files")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{text!r} is not a number" if text else "a number is missing") from None


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{text!r} is not a whole number" if text else "a whole number is missing") from None
