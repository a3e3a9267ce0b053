"""Text to token ids and back: our byte-level BPE, or any `tokenizer.json`.

Text never becomes a special token, whatever it says: only the program writes those.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from lumina.errors import UserError

# "true" is the default, encode in threads; but unless it is set, a process that forks later prints a warning.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

FILE_NAME = "tokenizer.json"
END = "<|end|>"
SPECIALS = (END, "<|system|>", "<|user|>", "<|assistant|>")  # ids 0 to 3
BYTES = 256
FOREIGN_ENDS = (END, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")

# Words take one leading mark, numbers come in pairs of digits, and the end of a line joins the next line's
# indentation, also after punctuation: `:\n        ` can be one token. On the sample with 2048 ids this gives
# 3.36 bytes a token; the patterns of GPT-2 and Llama 3 give 3.19.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?|[\r\n]+[ \t]*|\s+(?!\S)|\s+"
# Long texts are handled in pieces, in parallel and within memory; `WORDS` ends a word at every such border.
PIECE = 1 << 18  # characters
BPE_CHARACTERS = 1 << 26  # that BPE is trained on: more text hardly changes the merges, but takes its time
_PIECE_BORDER = re.compile(r"\S\r?\n(?=\S)")


class Tokenizer:
    """Ids are below `vocab_size`; `end_id` stands before and after each document; `fingerprint` names all."""

    def __init__(self, inner: tokenizers.Tokenizer, name: str = "this tokenizer") -> None:
        """Raises `UserError` about `name` if there is no usable token for the end of a document."""
        inner.encode_special_tokens = True
        inner.no_truncation()  # published files often cut at 512 tokens, or pad
        inner.no_padding()
        self._inner = inner
        ids = {token: inner.token_to_id(token) for token in FOREIGN_ENDS}
        end, end_id = next(((token, i) for token, i in ids.items() if i is not None), (None, None))
        if end is None or end_id is None:
            raise UserError(
                f"{name} has no token for the end of a document; looked for {' '.join(FOREIGN_ENDS)}",
                fix="add one of these to its added_tokens, as special",
            )
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        self.end_id: int = end_id
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
        canonical = json.dumps(json.loads(inner.to_str()), sort_keys=True)
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()[:16]

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
        return cls(inner, str(file))

    def save(self, folder: str | Path) -> None:
        """Writes `folder/tokenizer.json`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._inner.save(str(Path(folder, FILE_NAME)))

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

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return str(self._inner.decode(list(ids), skip_special_tokens=True))

    def stream(self) -> TextStream:
        return TextStream(self)


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
        border = _PIECE_BORDER.search(text, start + PIECE)
        if border is None:
            break
        yield text[start : border.end()]
        start = border.end()
    yield text[start:]
