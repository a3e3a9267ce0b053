"""Text to token ids and back: our byte-level BPE, or any `tokenizer.json`.

Text never becomes a special token, whatever it says: only the program writes those.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from lumina.data import template
from lumina.data.template import ChatTemplate
from lumina.errors import UserError

# "true" is the default, encode in threads; but unless it is set, a process that forks later prints a warning.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

FILE_NAME = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
END = "<|end|>"
SPECIALS = (END, "<|system|>", "<|user|>", "<|assistant|>")  # ids 0 to 3
BYTES = 256
# Looked for in this order in a tokenizer that is not ours and whose settings name no eos_token. `END` is the last: in
# some it ends a turn.
FOREIGN_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]", END)
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Words take one leading mark, numbers come in pairs of digits, and the end of a line joins the next line's
# indentation, also after punctuation: `:\n        ` can be one token. On the sample with 2048 ids this gives
# 3.36 bytes a token; the patterns of GPT-2 and Llama 3 give 3.19.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?|[\r\n]+[ \t]*|\s+(?!\S)|\s+"
# Long texts are handled in pieces, in parallel and within memory; `WORDS` ends a word at every such border.
PIECE = 1 << 18  # characters
BPE_CHARACTERS = 1 << 26  # that BPE is trained on: more text hardly changes the merges, but takes its time
PIECE_BORDER = re.compile(r"\S\r?\n(?=\S)")


class Tokenizer:
    """Ids are below `vocab_size`; `end_id` stands before and after each document; `fingerprint` names all."""

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        name: str = "this tokenizer",
        chat_template: str = "",
        settings: dict[str, Any] | None = None,
    ) -> None:
        """`settings` are those of a tokenizer_config.json. Raises `UserError` about `name` if there is no usable token
        for the end of a document."""
        inner.encode_special_tokens = True
        inner.no_truncation()  # published files often cut at 512 tokens, or pad
        inner.no_padding()
        self._inner, self._name, self._settings = inner, name, settings or {}
        special = {i: token for i, token in inner.get_added_tokens_decoder().items() if token.special}
        self.specials: dict[str, int] = {token.content: i for i, token in special.items()}
        # Which of them take the white space on their left, and on their right.
        self.strips = {i: (token.lstrip, token.rstrip) for i, token in special.items() if token.lstrip or token.rstrip}
        own = self.specials.keys() >= set(SPECIALS)
        candidates = (END,) if own else (self._named().get("eos_token", FOREIGN_ENDS[0]), *FOREIGN_ENDS)
        ids = {token: inner.token_to_id(token) for token in candidates}
        end, end_id = next(((token, i) for token, i in ids.items() if i is not None), (None, None))
        if end is None or end_id is None:
            raise UserError(
                f"{name} has no token for the end of a document; looked for {' '.join(ids)}",
                fix="add one of these to its added_tokens, as special",
            )
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        self.end, self.end_id = end, end_id
        if own or not settings:
            self._settings = {**self._settings, "bos_token": end, "eos_token": end, **self._named()}
        self.chat_template = chat_template or (template.DEFAULT if own else "")
        try:
            ends_itself = self.end_id in self.encode(end)
        except Exception as error:  # the library raises nothing narrower
            fix = "give one that knows every text: with bytes, or with an unknown token in its vocabulary"
            raise UserError(f"{name} cannot encode {end!r} ({error})", fix) from None
        if ends_itself:
            raise UserError(
                f"{name}: the text {end!r} inside a document would end it",
                fix=f'mark {end!r} in its added_tokens as "special": true',
            )
        rendered = {name: token for name, token in self._named().items() if name in self.chat_template}
        content = [json.loads(inner.to_str()), self.chat_template, end, rendered]
        self.fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def chat(self) -> ChatTemplate:
        """How it writes conversations. Raises `UserError` if it has no template for them."""
        if not self.chat_template:
            raise UserError(
                f"{self._name} has no chat template: conversations cannot be written in its tokens",
                fix=f"put {template.FILE_NAME} beside {FILE_NAME}, as transformers does",
            )
        return ChatTemplate(self.chat_template, self, self._named())

    def _named(self) -> dict[str, str]:
        """The special tokens that a template may name, as transformers gives them: none for what is null or missing."""
        tokens = {name: self._settings[name] for name in NAMED if self._settings.get(name)}
        texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
        return {name: token for name, token in texts.items() if isinstance(token, str)}

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads a `tokenizer.json`, or the one in a folder. Raises `UserError` if that cannot be done."""
        file = Path(os.path.expanduser(path))
        file = file / FILE_NAME if file.is_dir() else file
        if not file.is_file():
            raise UserError(f"{file}: no such tokenizer file", fix=f"give a {FILE_NAME}, a folder with one, or bpe")
        try:
            inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(
                f"{file}: not a readable {FILE_NAME} ({error})",
                fix="give a file that Hugging Face tokenizers wrote",
            ) from None
        return cls(inner, str(file), *_beside(file.parent))

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and, if there is one, chat_template.jinja, as transformers
        reads them."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._inner.save(str(Path(folder, FILE_NAME)))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **self._settings}
        settings.pop("chat_template", None)
        Path(folder, SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        if self.chat_template:
            Path(folder, template.FILE_NAME).write_text(self.chat_template, encoding="utf-8", newline="")

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, in parallel."""
        cut = [(i, piece) for i, text in enumerate(texts) for piece in pieces(text)]
        encoded = self._inner.encode_batch_fast([piece for _, piece in cut], add_special_tokens=False)
        ids: list[list[int]] = [[] for _ in texts]
        for (i, _), encoding in zip(cut, encoded, strict=True):
            ids[i] += encoding.ids
        return ids

    def encode_arrays(self, texts: Sequence[str], dtype: str) -> list[NDArray[Any]]:
        """The ids of each text as an array, in parallel."""
        cut = [(i, piece) for i, text in enumerate(texts) for piece in pieces(text)]
        encoded = self._inner.encode_batch_fast([piece for _, piece in cut], add_special_tokens=False)
        ids: list[list[NDArray[Any]]] = [[] for _ in texts]
        for (i, _), encoding in zip(cut, encoded, strict=True):
            ids[i].append(np.array(encoding.ids, dtype))
        return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in ids]

    def encode_with_places(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """The ids of each text, and of which of its characters (from, to) each is made, in parallel."""
        encoded = self._inner.encode_batch(list(texts), add_special_tokens=False)
        known = [(encoding.ids, encoding.offsets) for encoding in encoded]
        return [(ids, _without_gaps(places)) for ids, places in known] if self._leaves_gaps else known

    @cached_property
    def _leaves_gaps(self) -> bool:
        places = self._inner.encode(" a ", add_special_tokens=False).offsets
        return _without_gaps(places) != places

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return str(self._inner.decode(list(ids), skip_special_tokens=True))

    def stream(self) -> TextStream:
        return TextStream(self)


def _beside(folder: Path) -> tuple[str, dict[str, Any]]:
    """The chat template and the settings that lie beside a tokenizer.json, as transformers finds them."""
    settings: dict[str, Any] = {}
    try:
        if (folder / SETTINGS).is_file():
            settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            if not isinstance(settings, dict):
                raise ValueError("no object")
            for key in ("bos_token", "eos_token"):
                token = settings.get(key) or ""
                if not isinstance(token["content"] if isinstance(token, dict) else token, str):
                    raise ValueError(f"{key} is no token")
        file = folder / template.FILE_NAME
        source = file.read_bytes().decode() if file.is_file() else settings.get("chat_template") or ""
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{folder}: the settings of its tokenizer cannot be read: {error}",
            fix=f"mend its {SETTINGS} or its {template.FILE_NAME}",
        ) from None
    if not isinstance(source, str):
        raise UserError(f"{folder / SETTINGS}: several chat templates", f"put the one to use into {template.FILE_NAME}")
    return source, settings


def _without_gaps(places: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Some tokenizers do not say of which token a space is: it is of the next one."""
    known, filled = 0, list[tuple[int, int]]()
    for start, stop in places:
        if filled and filled[-1][0] == filled[-1][1]:  # a token of spaces only, at the beginning
            filled[-1], known = (known, max(known, start)), max(known, start)
        filled.append((min(start, known), stop))
        known = max(known, stop)
    return filled


class TextStream:
    """Decodes id by id into whole characters. All parts and `flush` together equal `decode` of all."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._given: list[int] = []  # the ids of the latest part: some decoders look one word back
        self._held: list[int] = []

    def feed(self, token: int) -> str:
        """The text that `token` completes, often empty."""
        self._held.append(token)
        text = self._held_text()
        return "" if text.endswith("\ufffd") else self._give(text)

    def flush(self) -> str:
        """What is still held back: the bytes of an unfinished character, as U+FFFD."""
        return self._give(self._held_text())

    def _held_text(self) -> str:
        before = self._tokenizer.decode(self._given)
        return self._tokenizer.decode(self._given + self._held)[len(before) :]

    def _give(self, text: str) -> str:
        if text:
            self._given, self._held = self._held, []
        return text


def train_bpe(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Byte-level BPE with at most `vocab` ids: 4 specials, 256 bytes, then merges. Equal texts, equal
    tokenizer.

    Only pairs that occur twice are merged, so small texts give fewer ids. The first `BPE_CHARACTERS` are
    looked at. Raises `UserError` if `vocab` cannot hold specials and bytes.
    """
    if vocab < len(SPECIALS) + BYTES:
        raise UserError(
            f"model.vocab={vocab} is too small: {BYTES} bytes and {len(SPECIALS)} special tokens need "
            f"{len(SPECIALS) + BYTES}",
            fix=f"set model.vocab to {len(SPECIALS) + BYTES} or more",
        )
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(_first_pieces(texts), trainer)
    return Tokenizer(inner)


def _first_pieces(texts: Iterable[str]) -> Iterator[str]:
    size = 0
    for piece in (piece for text in texts for piece in pieces(text)):
        if size >= BPE_CHARACTERS:
            return
        yield piece
        size += len(piece)


def pieces(text: str) -> Iterator[str]:
    """`text` in parts of `PIECE` characters or more, the last one shorter, cut where `WORDS` ends a word."""
    start = 0
    while len(text) - start > PIECE:
        border = PIECE_BORDER.search(text, start + PIECE)
        if border is None:
            break
        yield text[start : border.end()]
        start = border.end()
    yield text[start:]
