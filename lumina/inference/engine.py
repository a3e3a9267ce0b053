"""A trained model that writes: loads a run's newest complete checkpoint and generates with a KV cache."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch

from lumina.checkpoint import store
from lumina.checkpoint.catalogue import abandoned
from lumina.config.resolve import read
from lumina.data.tokenizer import Tokenizer
from lumina.errors import UserError
from lumina.inference.cache import Cache
from lumina.inference.sampler import Sampler
from lumina.model.transformer import Transformer
from lumina.run.folder import Run
from lumina.run.lineage import lineage


@dataclass
class Model:
    """A run's model, ready to generate; `step` is the checkpoint it came from, `skipped` the broken ones.

    One that `talks` was trained on conversations.
    """

    transformer: Transformer
    tokenizer: Tokenizer
    step: int
    skipped: list[str]
    talks: bool = False

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end a text or an answer."""
        return frozenset({self.tokenizer.end_id}) | (self.tokenizer.chat.stop_ids if self.talks else frozenset())

    def generate(self, prompt: str, max_tokens: int = 200, *, seed: int = 0, **sampling: float) -> str:
        """The continuation of `prompt` as one string; `sampling` as in `Sampler`."""
        return "".join(self.stream(prompt, max_tokens, seed=seed, **sampling))

    def stream(
        self, prompt: str, max_tokens: int = 200, *, seed: int = 0, **sampling: float
    ) -> Generator[str, None, str]:
        """Yields text as soon as its characters are complete; returns why it ended.

        That is `end` (the end token), `length` (`max_tokens`) or `context` (the context is full). Of a prompt that
        leaves less than half of the context to write in, the end is kept. Raises `UserError`, before anything is
        yielded, for impossible sampling settings and for a prompt that is not Unicode text.
        """
        sampler = Sampler(**sampling)  # type: ignore[arg-type]
        return self.stream_ids(self.encode(prompt), max_tokens, seed, sampler)

    def encode(self, text: str) -> list[int]:
        """The ids of a text that begins a document. Raises `UserError` if it is not Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # an argument with bytes that are not UTF-8 arrives as lone surrogates
            raise UserError(
                f"the prompt is not UTF-8 text at character {error.start + 1}",
                fix="convert it, for example with iconv -f latin1 -t utf-8",
            ) from None
        return [self.tokenizer.end_id, *self.tokenizer.encode(text)]

    def prompt_room(self, max_tokens: int) -> int:
        """How many tokens of a prompt are read: what remains of the context beside an answer of at most half of it."""
        context = self.transformer.config.seq_len
        return context - min(max_tokens, context // 2)

    def left_out(self, prompt: str, max_tokens: int) -> int:
        """How many tokens at the start of a prompt do not fit and are not read."""
        return max(0, len(self.encode(prompt)) - self.prompt_room(max_tokens))

    def new_cache(self) -> Cache:
        return Cache(self.transformer.config, batch=1, like=self.transformer.embed.weight)

    def stream_ids(
        self, prompt_ids: list[int], max_tokens: int, seed: int, sampler: Sampler, cache: Cache | None = None
    ) -> Generator[str, None, str]:
        """`stream` for an encoded prompt; a new `cache` from the caller shows what was stored."""
        generator, text = torch.Generator().manual_seed(seed), self.tokenizer.stream()
        ids = torch.tensor([prompt_ids[-self.prompt_room(max_tokens) :]])
        cache, reason, stop_ids = cache or self.new_cache(), "length", self.stop_ids
        for _ in range(max_tokens):
            logits_BV = self.transformer.next_logits(ids, cache.layers, cache.position)
            cache.advance(ids.shape[1])
            token = int(sampler.pick(logits_BV, generator)[0])
            if token in stop_ids:
                reason = "end"
                break
            yield text.feed(token)
            if cache.position == cache.capacity:
                reason = "context"
                break
            ids = torch.tensor([[token]])
        yield text.flush()
        return reason


def load(run: Run) -> Model:
    """Loads the newest complete checkpoint of a run, on the CPU in fp32.

    Raises `UserError` if there is none yet, or if the run's tokenizer is not the one the weights were trained with.
    """
    while True:
        out = abandoned(run.checkpoints, lineage(run).counts)
        found, skipped = store.newest(run.checkpoints, without=out, own=run.id)
        if found is None:
            raise UserError(
                f"{run.path}: no complete checkpoint" + "".join(f"\n  {path.name}: {why}" for path, why in skipped),
                fix=f"let it train until it saves one: lumina resume {run.path}",
            )
        try:
            return _load(run, found, [f"{path.name}: {why}" for path, why in skipped])
        except Exception:
            if found.path.exists():
                raise
            # The run is training, and has deleted it for newer ones.


def _load(run: Run, found: store.Checkpoint, skipped: list[str]) -> Model:
    run.require_tokenizer()
    tokenizer = Tokenizer.load(run.tokenizer)
    if tokenizer.fingerprint != found.state["tokenizer"]:
        raise UserError(
            f"{run.tokenizer}: this tokenizer ({tokenizer.fingerprint}) is not the one that {found.path.name} "
            f"was trained with ({found.state['tokenizer']})",
            fix="restore the run's tokenizer/tokenizer.json",
        )
    config = read(run.config).config
    transformer = Transformer(config.model, lora=config.train.lora)
    transformer.cast(torch.bfloat16 if config.precision.mode == "bf16_pure" else torch.float32)
    store.load(found, transformer.tensors())
    transformer.cast(torch.float32)
    transformer.eval()
    return Model(transformer, tokenizer, found.step, skipped, talks=config.data.mode != "base")
