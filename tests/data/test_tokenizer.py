"""Text and ids: lossless, deterministic, and never a special token by accident."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from lumina.data import tokenizer as module
from lumina.data.tokenizer import FOREIGN_ENDS, SPECIALS, Tokenizer, train_bpe
from lumina.errors import UserError

TEXTS = ["def main(argv):\n    return argv[0]\n" * 20, "naïve café 東京 🙂 12345\r\n\t" * 20]
BPE = train_bpe(TEXTS, 300)
PLAIN = train_bpe(TEXTS, 260)
SPACES = train_bpe([a + b for a in " \t\r\n" for b in " \t\r\n"] * 2, 300)  # sensitive to borders in white space


def metaspace() -> Tokenizer:
    """A tokenizer whose decoder looks at a word's neighbour: it drops the first word's space."""
    vocab = {"</s>": 0, "<unk>": 1, "▁a": 2, "▁b": 3, "a": 4, "b": 5, "▁": 6}
    inner = tokenizers.Tokenizer(models.BPE(vocab, [("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.add_special_tokens(["</s>"])
    return Tokenizer(inner)


def foreign(path: Path, *ends: str, special: bool = True) -> tokenizers.Tokenizer:
    inner = foreign_inner(*ends, special=special)
    inner.save(str(path))
    return inner


def foreign_inner(*ends: str, special: bool = True) -> tokenizers.Tokenizer:
    vocab = {chr_: i for i, chr_ in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = tokenizers.Tokenizer(models.BPE(vocab, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens([tokenizers.AddedToken(end, special=special) for end in ends or ("<|endoftext|>",)])
    return inner


@given(st.text())
def test_round_trip(text: str) -> None:
    for tokenizer in (BPE, PLAIN):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_plain_bytes_and_merges() -> None:
    assert PLAIN.vocab_size == 260
    assert len(PLAIN.encode("é🙂")) == 2 + 4
    assert BPE.vocab_size == 300
    assert len(BPE.encode(TEXTS[0])) < len(TEXTS[0]) / 3


def test_every_byte_has_an_id() -> None:
    ids = PLAIN.encode("".join(map(chr, range(0x80))) + "é")
    assert len(set(ids)) == 0x80 + 2
    assert set(ids) <= set(range(len(SPECIALS), 260))


@pytest.mark.parametrize("special", SPECIALS)
def test_text_never_becomes_a_special_token(special: str) -> None:
    ids = BPE.encode(f"a {special} b")
    assert not set(ids) & set(range(len(SPECIALS)))
    assert BPE.decode(ids) == f"a {special} b"


def test_end_token_is_id_0_and_shows_no_text() -> None:
    assert BPE.end_id == 0
    assert BPE.decode([*BPE.encode("a"), 0, *BPE.encode("b")]) == "ab"


def test_training_is_deterministic(tmp_path: Path) -> None:
    assert train_bpe(iter(TEXTS), 300).fingerprint == BPE.fingerprint
    assert len({BPE.fingerprint, PLAIN.fingerprint, train_bpe(TEXTS[:1], 300).fingerprint}) == 3


def test_training_stops_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BPE_CHARACTERS", len(TEXTS[0]))
    assert train_bpe(TEXTS, 300).fingerprint == train_bpe(TEXTS[:1], 300).fingerprint


def test_vocabulary_below_bytes_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.vocab=259 is too small") as caught:
        train_bpe(TEXTS, 259)
    assert "260 or more" in caught.value.fix


@given(st.text(alphabet="ab1. \t\r\n\u2028é", max_size=60))
def test_pieces_change_no_token(text: str) -> None:
    whole = SPACES.encode(text)
    size, module.PIECE = module.PIECE, 1
    try:
        parts = list(module.pieces(text))
        assert SPACES.encode(text) == whole
    finally:
        module.PIECE = size
    assert "".join(parts) == text


def test_long_texts_are_cut() -> None:
    text = "x = 1\n" * (2 * module.PIECE)
    assert max(map(len, module.pieces(text))) < module.PIECE + 10


def test_batch_equals_single() -> None:
    texts = [*TEXTS, "", "x\n" * module.PIECE]
    assert BPE.encode_batch(texts) == [BPE.encode(text) for text in texts]
    assert BPE.encode_batch([]) == []


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_arrays_hold_the_ids_of_each_text(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*TEXTS, "", "x\ny\n" * 50]
    monkeypatch.setattr(module, "PIECE", 20)  # most texts are several pieces
    arrays = BPE.encode_arrays(texts, dtype)
    assert [array.tolist() for array in arrays] == BPE.encode_batch(texts)
    assert {str(array.dtype) for array in arrays} == {dtype}
    assert BPE.encode_arrays([], dtype) == []


@given(st.text(alphabet="def main \n12é🙂", max_size=60))
def test_places_say_of_which_characters_each_token_is(text: str) -> None:
    ((ids, places),) = BPE.encode_with_places([text])
    assert ids == BPE.encode(text)
    assert places == sorted(places)
    assert [i for i, (start, stop) in enumerate(places) if start >= stop] == []
    for i, (start, _) in enumerate(places):
        if i == 0 or start != places[i - 1][0]:  # else a character of several tokens
            assert BPE.decode(ids[:i]).rstrip("\ufffd") == text[:start].rstrip("\ufffd")


def test_places_have_no_gaps() -> None:
    """Some tokenizers say that the space before a word is of no token."""
    inner = foreign_inner()
    inner.post_processor = processors.ByteLevel(trim_offsets=True)
    ((ids, places),) = Tokenizer(inner).encode_with_places([" é  b "])
    assert places == [(0, 1), (1, 2), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)]
    assert len(ids) == 7


@given(st.lists(st.integers(0, 299), max_size=60))
def test_streaming_any_ids_equals_decoding_them(ids: list[int]) -> None:
    for tokenizer in (BPE, PLAIN):
        stream = tokenizer.stream()
        assert "".join([*map(stream.feed, ids), stream.flush()]) == tokenizer.decode(ids)


@given(st.lists(st.integers(0, 6), max_size=20))
def test_streaming_with_a_decoder_that_looks_back(ids: list[int]) -> None:
    tokenizer = metaspace()
    stream = tokenizer.stream()
    assert "".join([*map(stream.feed, ids), stream.flush()]) == tokenizer.decode(ids)


def test_streaming_gives_whole_characters_at_once() -> None:
    stream = PLAIN.stream()
    assert [stream.feed(i) for i in PLAIN.encode("é🙂a")] == ["", "é", "", "", "", "🙂", "a"]
    assert stream.flush() == ""
    assert [stream.feed(i) for i in PLAIN.encode("é")[:1]] == [""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_save_and_load(tmp_path: Path) -> None:
    BPE.save(tmp_path / "new" / "tokenizer")
    for path in (tmp_path / "new" / "tokenizer", str(tmp_path / "new" / "tokenizer" / "tokenizer.json")):
        loaded = Tokenizer.load(path)
        assert (loaded.fingerprint, loaded.vocab_size, loaded.end_id) == (BPE.fingerprint, 300, 0)
        assert loaded.encode(TEXTS[1] + "<|end|>") == BPE.encode(TEXTS[1] + "<|end|>")


def test_what_is_saved_is_complete(tmp_path: Path) -> None:
    """Settings that another program wrote are kept, and a template is a file of its own."""
    foreign(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 9, "chat_template": "x"}')
    Tokenizer.load(tmp_path).save(tmp_path / "again")
    settings = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 9
    assert "eos_token" not in settings  # in a template of its own this would be something else
    assert "chat_template" not in settings
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "x"
    assert Tokenizer.load(tmp_path / "again").fingerprint == Tokenizer.load(tmp_path).fingerprint


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_settings_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    foreign(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(UserError, match="the settings of its tokenizer cannot be read"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("end", FOREIGN_ENDS)
def test_foreign_tokenizer(tmp_path: Path, end: str) -> None:
    inner = foreign(tmp_path / "t.json", end)
    inner.enable_truncation(4)
    inner.enable_padding(length=8)
    inner.post_processor = processors.TemplateProcessing(single=f"{end} $A", special_tokens=[(end, 256)])
    inner.save(str(tmp_path / "t.json"))
    loaded = Tokenizer.load(tmp_path / "t.json")
    assert (loaded.end_id, loaded.vocab_size) == (256, 257)
    text = f"cut at four, {end}, filled to eight"
    assert len(loaded.encode(text)) == len(text)
    assert [len(ids) for ids in loaded.encode_batch(["a", text])] == [1, len(text)]
    assert loaded.decode(loaded.encode(text)) == text


@pytest.mark.parametrize(
    ("settings", "end"),
    [
        ({}, "<|endoftext|>"),
        ({"eos_token": "<|im_end|>"}, "<|im_end|>"),
        ({"eos_token": {"content": "<|end|>"}}, "<|end|>"),
        ({"eos_token": "<missing>"}, "<|endoftext|>"),
        ({"eos_token": None}, "<|endoftext|>"),
    ],
)
def test_the_end_is_what_the_settings_say(settings: dict[str, object], end: str) -> None:
    """`<|end|>` is ours only beside our other special tokens: in Phi-3 it ends a turn."""
    inner = foreign_inner("<|end|>", "<|im_end|>", "<|endoftext|>")
    assert Tokenizer(inner, settings=settings).end == end


def test_another_end_is_another_tokenizer() -> None:
    ends = [{"eos_token": end} for end in ("<|im_end|>", "<|endoftext|>")]
    inner = foreign_inner("<|im_end|>", "<|endoftext|>")
    assert len({Tokenizer(inner, settings=dict(end)).fingerprint for end in ends}) == 2


def test_what_a_template_names_is_of_the_fingerprint() -> None:
    source = "{{ bos_token }}{% for m in messages %}{{ m['content'] + '<|endoftext|>' }}{% endfor %}"
    settings: list[dict[str, object]] = [{"bos_token": None}, {"bos_token": "<|im_end|>"}, {"bos_token": "x"}, {}]
    tokenizers_ = [Tokenizer(foreign_inner(), chat_template=source, settings={"x": 1, **s}) for s in settings]
    assert len({tokenizer.fingerprint for tokenizer in tokenizers_}) == 3
    plain = [Tokenizer(foreign_inner(), settings={"x": 1, **s}).fingerprint for s in settings]
    assert len(set(plain)) == 1


def test_foreign_ids_may_have_holes(tmp_path: Path) -> None:
    foreign(tmp_path / "t.json")
    content = json.loads((tmp_path / "t.json").read_text())
    content["added_tokens"][0]["id"] = 999
    (tmp_path / "t.json").write_text(json.dumps(content))
    loaded = Tokenizer.load(tmp_path / "t.json")
    assert loaded.vocab_size == loaded.end_id + 1


def test_foreign_tokenizer_without_an_end_says_what_was_looked_for(tmp_path: Path) -> None:
    foreign(tmp_path / "t.json", "<fin>")
    with pytest.raises(UserError, match=r"t\.json has no token for the end") as caught:
        Tokenizer.load(tmp_path / "t.json")
    assert all(end in caught.value.message for end in FOREIGN_ENDS)


def test_foreign_end_that_text_can_write_is_refused(tmp_path: Path) -> None:
    foreign(tmp_path / "t.json", special=False)
    with pytest.raises(UserError, match="inside a document would end it"):
        Tokenizer.load(tmp_path / "t.json")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe", b"not json", b'{"model": {"type": "BPE"}}'])
def test_unreadable_tokenizer_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(UserError, match=r"t\.json: not a readable tokenizer\.json"):
        Tokenizer.load(tmp_path / "t.json")


def test_missing_tokenizer_files(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "t.json"):
        with pytest.raises(UserError, match="no such tokenizer file"):
            Tokenizer.load(path)


def test_forking_after_encoding_prints_nothing() -> None:
    program = (
        "import os; from lumina.data.tokenizer import train_bpe; t = train_bpe(['a b c'] * 99, 260)\n"
        "t.encode_batch(['x', 'y'] * 99)\n"
        "pid = os.fork()\n"
        "if not pid: os._exit(0)\n"
        "os.waitpid(pid, 0)"
    )
    env = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert done.stderr == done.stdout == ""


def test_long_streams_of_broken_bytes_stay_exact() -> None:
    ids = random.Random(0).choices(range(4, 260), k=2000)
    stream = PLAIN.stream()
    assert "".join([*map(stream.feed, ids), stream.flush()]) == PLAIN.decode(ids)
