"""Chat templates of well-known models, each with a small tokenizer: ids and masks are what transformers gives."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import settings as how
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as HuggingFace

from lumina.data.records import Message, Role
from lumina.data.template import COUNTED, TURN
from lumina.data.tokenizer import Tokenizer

MERGES = [("Ġ", "P"), ("a", "r"), ("i", "s"), ("ar", "is"), ("ĠP", "aris"), ("Ċ", "Ċ"), ("Ġ", "Ġ"), (":", "Ġ")]
GPT4 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Style:
    """A template with `GEN`…`END` around what the model writes, the special tokens, and the settings.

    `turn` is what a second user's turn begins with, `stops` are the tokens that end an answer.
    """

    template: str
    specials: tuple[str, ...]
    turn: str
    stops: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    strips: tuple[str, ...] = ()  # that take the white space behind them
    system: bool = True

    def tokenizer(self, marked: bool) -> Tokenizer:
        vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        for a, b in MERGES:
            vocab[a + b] = len(vocab)
        inner = HuggingFace(models.BPE(vocab, MERGES))
        split = pre_tokenizers.Split(Regex(GPT4), "isolated")
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        inner.post_processor = processors.ByteLevel(trim_offsets=False)
        inner.decoder = decoders.ByteLevel()
        inner.add_tokens(
            [AddedToken(s, special=True, normalized=False, rstrip=s in self.strips) for s in self.specials]
        )
        edges = {"GEN": "{% generation %}", "END": "{% endgeneration %}"} if marked else {"GEN": "", "END": ""}
        source = re.sub("GEN|END", lambda match: edges[match[0]], self.template)
        return Tokenizer(inner, chat_template=source, settings={"model_max_length": 4096, **self.settings})


LLAMA3 = Style(
    "{% for message in messages %}{% set head = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' %}"
    "{% if loop.index0 == 0 %}{% set head = bos_token + head %}{% endif %}{{ head }}"
    "{% if message['role'] == 'assistant' %}GEN{{ message['content'] | trim + '<|eot_id|>' }}END"
    "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    turn="<|start_header_id|>",
    stops=("<|eot_id|>",),
    settings={"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
)
LLAMA2 = Style(
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' }}GEN{{ message['content'].strip() + eos_token }}END{% endif %}{% endfor %}",
    ("<unk>", "<s>", "</s>"),
    turn="<s>",
    stops=("</s>",),
    settings={"bos_token": {"content": "<s>", "__type": "AddedToken"}, "eos_token": "</s>", "unk_token": "<unk>"},
    system=False,
)
QWEN = Style(
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "GEN{{ message['content'] + '<|im_end|>' }}END{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    turn="<|im_start|>",
    stops=("<|im_end|>",),
    settings={"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
)
CHATML = Style(QWEN.template.replace("{{ bos_token }}", ""), QWEN.specials, QWEN.turn, QWEN.stops)
PHI3 = Style(
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}GEN{{ message['content'] + '<|end|>' }}END{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|user|>", "<|end|>", "<s>"),
    turn="<|user|>",
    stops=("<|end|>",),
    settings={"bos_token": "<s>", "eos_token": "<|endoftext|>"},
)
PHI3_STRIPPING = Style(
    PHI3.template, (*PHI3.specials[1:], PHI3.specials[0]), PHI3.turn, PHI3.stops, PHI3.settings, PHI3.specials[2:5]
)
VICUNA = Style(
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' }}GEN{{ message['content'] + '</s>' }}END{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    ("<unk>", "<s>", "</s>"),
    turn="USER: ",
    stops=("</s>",),
    settings={"unk_token": "<unk>"},
)
THINKING = Style(
    QWEN.template.replace("GEN{{", "GEN{{ '<think>\n\n</think>\n\n' +"),
    (*QWEN.specials, "<think>", "</think>"),
    QWEN.turn,
    QWEN.stops,
    QWEN.settings,
)
STYLES = {
    "llama3": LLAMA3, "llama2": LLAMA2, "qwen": QWEN, "chatml": CHATML, "phi3": PHI3, "vicuna": VICUNA,
    "phi3-stripping": PHI3_STRIPPING, "thinking": THINKING,
}  # fmt: skip


@pytest.fixture(scope="module", params=STYLES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Style, Tokenizer, Any]:
    """A style, our tokenizer with generation blocks, and what transformers loads of it."""
    style = STYLES[request.param]
    folder = tmp_path_factory.mktemp("style")
    style.tokenizer(marked=True).save(folder)
    return style, Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)


WORDS = ["Paris", " Paris", " ", "  ", "\n", "\n\n", "\t", "é", "🙂", "<|", "12", ": ", "{{ x }}", "[INST]"]
SAID = st.lists(st.sampled_from(WORDS), max_size=6).map("".join)


@st.composite
def alternating(draw: st.DrawFn, said: st.SearchStrategy[str] = SAID) -> list[Message]:
    """Turns by turns, answers with text, and perhaps a system turn before them."""
    messages = [Message("system", draw(said))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [Message("user", draw(said)), Message("assistant", draw(said.filter(str.strip)))]
    return messages


def of(style: Style, messages: Sequence[Message]) -> list[Message]:
    return [message for message in messages if style.system or message.role != "system"]


@given(messages=alternating())
@how(deadline=None, max_examples=60)
def test_ids_and_masks_are_those_of_transformers(both: tuple[Style, Tokenizer, Any], messages: list[Message]) -> None:
    style, tokenizer, theirs = both
    messages = of(style, messages)
    ((ids, marks),) = tokenizer.chat.encode([messages])
    plain = [message._asdict() for message in messages]
    result = theirs.apply_chat_template(plain, return_dict=True, return_assistant_tokens_mask=True)
    assert ids == result["input_ids"]
    assert [mark & COUNTED for mark in marks] == result["assistant_masks"]
    ((ids, _),) = tokenizer.chat.encode([messages[:-1]], open=True)
    assert ids == theirs.apply_chat_template(plain[:-1], add_generation_prompt=True, return_dict=False)


@given(messages=alternating())
@how(deadline=None, max_examples=30)
def test_without_generation_blocks_the_same_counts(both: tuple[Style, Tokenizer, Any], messages: list[Message]) -> None:
    style, tokenizer, _ = both
    if style is THINKING:
        return  # what is before the text is not known to be of the answer
    messages = of(style, messages)
    assert style.tokenizer(marked=False).chat.encode([messages]) == tokenizer.chat.encode([messages])


@given(
    messages=alternating(st.lists(st.sampled_from(["a ", "<s>", "</s>", "<|end|>", "<|im_end|>", "x"])).map("".join))
)
@how(deadline=None, max_examples=30)
def test_what_is_said_is_text(both: tuple[Style, Tokenizer, Any], messages: list[Message]) -> None:
    """As in transformers when it is told to take control tokens in messages as text."""
    style, tokenizer, theirs = both
    messages = of(style, messages)
    ((ids, _),) = tokenizer.chat.encode([messages])
    plain = [message._asdict() for message in messages]
    assert ids == theirs.apply_chat_template(plain, sanitize_control_tokens=True, return_dict=False)


def test_turns_and_stops(both: tuple[Style, Tokenizer, Any]) -> None:
    """A cut falls before all that belongs to a user's turn, and behind the answer's stop."""
    style, tokenizer, theirs = both
    roles: list[Role] = ["user", "assistant"] * 3
    ((ids, marks),) = tokenizer.chat.encode([[Message(role, "Paris") for role in roles]])
    turns = [i for i, mark in enumerate(marks) if mark & TURN]
    assert len(turns) == 2
    for at in turns:
        assert theirs.decode(ids[at:]).startswith(style.turn)
        assert marks[at - 1] & COUNTED or theirs.decode(ids[at - 1 : at]) == "\n"
    assert tokenizer.chat.stop_ids == {tokenizer.specials[token] for token in style.stops}


def test_the_first_token_of_an_answer_counts_though_it_begins_before() -> None:
    tokenizer = LLAMA2.tokenizer(marked=False)
    ((ids, marks),) = tokenizer.chat.encode([[Message("user", "?"), Message("assistant", "Paris")]])
    counted = [i for i, mark in zip(ids, marks, strict=True) if mark & COUNTED]
    assert counted == [*tokenizer.encode(" Paris"), tokenizer.specials["</s>"]]
    assert len(counted) == 2


def test_turns_between_which_no_special_token_stands() -> None:
    """The text is one for the tokenizer, and a turn is marked inside."""
    names = "{'user': '\nUSER: ', 'assistant': '\nBOT: '}"
    source = f"{{% for m in messages %}}{{{{ {names}[m['role']] + m['content'] }}}}{{% endfor %}}</s>"
    tokenizer = Style(source, ("</s>",), "", ()).tokenizer(marked=False)
    messages = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
    ((ids, marks),) = tokenizer.chat.encode([messages])
    assert ids[:-1] == tokenizer.encode("\nUSER: a\nBOT: b\nUSER: c\nBOT: d")
    turns = [i for i, mark in enumerate(marks) if mark & TURN]
    assert [tokenizer.decode(ids[at:]) for at in turns] == ["\nUSER: c\nBOT: d"]
    assert tokenizer.decode([i for i, mark in zip(ids, marks, strict=True) if mark & COUNTED]) == "bd"


def test_trimming_is_known_for_each_role_and_side(tmp_path: Path) -> None:
    source = QWEN.template.replace("GEN{{ message['content']", "GEN{{ message['content'].lstrip()")
    tokenizer = Style(source, QWEN.specials, "", (), QWEN.settings).tokenizer(marked=False)
    parts = tokenizer.chat.parts([Message("system", " s "), Message("user", " u "), Message("assistant", "\n a ")])
    assert [part.text for part in parts if part.id < 0] == [
        "system\n s ", "\n", "user\n u ", "\n", "assistant\na ", "\n"
    ]  # fmt: skip
