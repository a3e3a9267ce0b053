"""Conversations in tokens: what transformers writes, and nothing that somebody says becomes more than text."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HuggingFace

from lumina.data.records import Message, Role
from lumina.data.template import COUNTED, DEFAULT, TURN
from lumina.data.tokenizer import SPECIALS, Tokenizer, train_bpe
from lumina.errors import UserError

ENDS = "{{ message['content'] + '<|im_end|>' }}"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    + ENDS
    + "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (  # the same text
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}" + ENDS + "{% endgeneration %}{% else %}" + ENDS + "{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = ["hello, how are you?\n\n  fine | end |> user\n" * 20, "naïve 東京 🙂 12345\r\n" * 20]
OURS = train_bpe(TEXTS, 320)


def foreign(template: str = CHATML) -> Tokenizer:
    """Bytes without merges, and the special tokens of ChatML."""
    inner = HuggingFace(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens([AddedToken(token, special=True) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    return Tokenizer(inner, chat_template=template)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, transformers.PreTrainedTokenizerFast]:
    """What transformers loads from what we save."""
    loaded = {}
    for name, tokenizer in (("ours", OURS), ("chatml", foreign()), ("marked", foreign(MARKED))):
        folder = tmp_path_factory.mktemp(name)
        tokenizer.save(folder)
        loaded[name] = transformers.AutoTokenizer.from_pretrained(folder)
    return loaded


WORDS = ["hello", " ", "\n", "\n\n", "\r\n", "é", "東京", "🙂", "<|", "|>", "<|en", "12", "{{ x }}", "{% if %}", ""]
SAID = st.lists(st.sampled_from(WORDS), max_size=8).map("".join)
ANSWER = SAID.filter(str.strip)
INJECTED = st.lists(st.sampled_from([*WORDS, *SPECIALS, "<|im_start|>", "<|im_end|>", "<|endoftext|>"]), max_size=8)


@st.composite
def conversations(draw: st.DrawFn, said: st.SearchStrategy[str] = SAID) -> tuple[Message, ...]:
    """Perhaps a system turn, then turns of which some are the assistant's; a user may say nothing."""
    messages = [Message("system", draw(said))] if draw(st.booleans()) else []
    for role in draw(st.lists(st.sampled_from(["user", "assistant"]), max_size=5)):
        messages.append(Message(role, draw(said)))
    return (*messages, Message("user", draw(said)), Message("assistant", draw(said.filter(str.strip))))


def rendered(
    tokenizer: transformers.PreTrainedTokenizerFast, messages: Sequence[Message]
) -> tuple[list[int], list[int]]:
    result = tokenizer.apply_chat_template(
        [message._asdict() for message in messages], return_dict=True, return_assistant_tokens_mask=True
    )
    return list(result["input_ids"]), list(result["assistant_masks"])


def encoded(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    ((ids, marks),) = tokenizer.chat.encode([messages])
    return ids, [mark & COUNTED for mark in marks]


@given(conversations())
@settings(deadline=None, max_examples=150)
def test_our_template_is_what_transformers_writes_and_counts(
    theirs: dict[str, transformers.PreTrainedTokenizerFast], messages: tuple[Message, ...]
) -> None:
    assert encoded(OURS, messages) == rendered(theirs["ours"], messages)


@given(conversations())
@settings(deadline=None, max_examples=100)
def test_chatml_with_a_foreign_tokenizer(
    theirs: dict[str, transformers.PreTrainedTokenizerFast], messages: tuple[Message, ...]
) -> None:
    """With generation blocks, and without: then an answer and the special token behind it count."""
    expected = rendered(theirs["marked"], messages)
    assert encoded(foreign(MARKED), messages) == expected
    assert encoded(foreign(CHATML), messages) == expected
    assert expected[0] == rendered(theirs["chatml"], messages)[0]


@given(conversations())
@settings(deadline=None, max_examples=50)
def test_where_an_answer_would_begin(
    theirs: dict[str, transformers.PreTrainedTokenizerFast], messages: tuple[Message, ...]
) -> None:
    for name, tokenizer in (("ours", OURS), ("chatml", foreign())):
        asked = messages[:-1]
        ((ids, _),) = tokenizer.chat.encode([asked], open=True)
        plain = [message._asdict() for message in asked]
        assert ids == theirs[name].apply_chat_template(plain, add_generation_prompt=True, return_dict=False)


@given(conversations(INJECTED.map("".join)))
@settings(deadline=None, max_examples=100)
def test_text_never_becomes_a_special_token(messages: tuple[Message, ...]) -> None:
    """Exactly the special tokens that the roles give, in their places, and every text as it was said."""
    ((ids, marks),) = OURS.chat.encode([messages])
    specials = [0, *(i for m in messages for i in (OURS.specials[f"<|{m.role}|>"], *[0] * (m.role == "assistant")))]
    assert [i for i in ids if i < len(SPECIALS)] == specials
    assert OURS.decode(ids) == "".join(message.content for message in messages)
    counted = [i for i, mark in zip(ids, marks, strict=True) if mark & COUNTED]
    assert OURS.decode(counted) == "".join(m.content for m in messages if m.role == "assistant")
    chatml = foreign()
    ((ids, _),) = chatml.chat.encode([messages])
    starts, stops = (ids.count(chatml.specials[token]) for token in ("<|im_start|>", "<|im_end|>"))
    assert starts == stops == len(messages)
    assert chatml.specials["<|endoftext|>"] not in ids


def test_answers_and_their_stops_count_and_roles_do_not() -> None:
    messages = [Message("user", "a"), Message("assistant", "b"), Message("user", ""), Message("assistant", "c")]
    ((ids, marks),) = OURS.chat.encode([messages])
    end, _, user, assistant = (OURS.specials[token] for token in SPECIALS)
    a, b, c = (OURS.encode(text)[0] for text in "abc")
    assert ids == [end, user, a, assistant, b, end, user, assistant, c, end]
    assert list(marks) == [0, 0, 0, 0, COUNTED, COUNTED, TURN, 0, COUNTED, COUNTED]
    assert OURS.chat.stop_ids == {end}


def test_a_turn_of_chatml_begins_with_its_start() -> None:
    tokenizer = foreign()
    messages = [Message("system", "s"), Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    ((ids, marks),) = tokenizer.chat.encode([messages])
    turns = [i for i, mark in enumerate(marks) if mark & TURN]
    assert len(turns) == 1
    assert ids[turns[0]] == tokenizer.specials["<|im_start|>"]
    assert tokenizer.decode(ids[turns[0] :]) == "user\nc\n"
    assert tokenizer.chat.stop_ids == {tokenizer.specials["<|im_end|>"]}


def test_a_token_over_the_border_of_an_answer_counts() -> None:
    """`:` and `a` are one token, the first that the model has to write."""
    inner = HuggingFace(models.BPE({":": 0, "a": 1, "b": 2, ":a": 3}, [(":", "a")]))
    inner.add_tokens([AddedToken("</s>", special=True)])
    template = "{% for m in messages %}{{ ':' + m['content'] + '</s>' }}{% endfor %}"
    tokenizer = Tokenizer(inner, chat_template=template)
    ((ids, marks),) = tokenizer.chat.encode([[Message("assistant", "ab")]])
    assert (ids, list(marks)) == ([3, 2, 4], [COUNTED, COUNTED, COUNTED])


def test_threads_do_not_mix_up_masks() -> None:
    """A skeleton is made while others are encoded."""
    roles = list(itertools.product(("user", "assistant"), repeat=7))
    chats = [[Message(role, "x") for role in pattern] for pattern in roles]
    expected = foreign(MARKED).chat.encode(chats)
    template, interval = foreign(MARKED).chat, sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            encoded = list(pool.map(lambda chat: (template.render(chat), template.encode([chat])[0])[1], chats))
    finally:
        sys.setswitchinterval(interval)
    assert encoded == expected


def test_encoding_many_equals_encoding_each() -> None:
    chats = [[Message("user", f"q{i}"), Message("assistant", f"a{i}" * i)] for i in range(1, 20)]
    assert OURS.chat.encode(chats) == [OURS.chat.encode([chat])[0] for chat in chats]


@pytest.mark.parametrize("template", [DEFAULT, CHATML, MARKED, CHATML + "\r\n  \n"])
def test_save_and_load(template: str, tmp_path: Path) -> None:
    tokenizer = OURS if template == DEFAULT else foreign(template)
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.chat_template == template
    assert loaded.fingerprint == tokenizer.fingerprint
    messages = [Message("user", "hi"), Message("assistant", "hello")]
    assert loaded.chat.encode([messages]) == tokenizer.chat.encode([messages])


def test_the_template_of_tokenizer_config_is_found_and_the_other_comes_first(tmp_path: Path) -> None:
    foreign("").save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "old", "eos_token": {"content": "<|im_end|>"}}')
    assert Tokenizer.load(tmp_path).chat_template == "old"
    (tmp_path / "chat_template.jinja").write_text(MARKED.replace("'<|im_end|>'", "eos_token"))
    messages = [Message("user", "hi"), Message("assistant", "hello")]
    assert encoded(Tokenizer.load(tmp_path), messages) == encoded(foreign(MARKED), messages)


def test_another_template_is_another_tokenizer() -> None:
    assert len({foreign(template).fingerprint for template in ("", CHATML, MARKED)}) == 3


def refused(template: str, *messages: tuple[Role, str]) -> str:
    with pytest.raises(ValueError, match="the chat template") as caught:
        foreign(template).chat.parts([Message(*message) for message in messages])
    return str(caught.value)


@pytest.mark.parametrize("change", ["upper", "replace('\\n', ' ')", "truncate(3, True)"])
def test_a_template_that_changes_what_is_said(change: str) -> None:
    changing = CHATML.replace("message['content']", f"message['content'] | {change}")
    assert "changes what is said" in refused(changing, ("user", "a line\nand another"), ("assistant", "hello"))


def test_a_template_that_fails_as_a_program() -> None:
    failing = CHATML + "{% if messages | length > 2 %}{{ 1 / 0 }}{% endif %}"
    assert "division by zero" in refused(failing, ("user", "x"), ("assistant", "y"), ("user", "z"))


def test_a_template_that_looks_at_what_is_said() -> None:
    looking = CHATML.replace("{{ '\n' }}", "{% if 'secret' in message['content'] %}{{ '!' }}{% endif %}{{ '\n' }}")
    assert "changes what is said" in refused(looking, ("user", "a secret"), ("assistant", "hello"))


@pytest.mark.parametrize(("loop", "turns"), [
    ("messages if message['role'] != 'system'", "system user assistant"),
    ("messages | reverse", "user assistant"),
    ("messages + messages", "user assistant"),
])  # fmt: skip
def test_a_template_that_drops_turns_or_repeats_messages(loop: str, turns: str) -> None:
    template = CHATML.replace("in messages %}", f"in {loop} %}}")
    roles: list[Role] = ["system", "user", "assistant"]
    messages = [(role, "x") for role in roles if role in turns.split()]
    with pytest.raises((ValueError, UserError), match="does not write each message once, in order"):
        foreign(template).chat.parts([Message(*message) for message in messages])


def test_a_template_that_refuses() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
    assert "refuses it: no system turn" in refused(strict, ("system", "x"), ("user", "x"), ("assistant", "y"))


@pytest.mark.parametrize("template", ["{% for %}", "{{ messages", "{% generation %}"])
def test_what_is_not_jinja(template: str) -> None:
    with pytest.raises(UserError, match="the chat template is not Jinja") as caught:
        _ = foreign(template).chat
    assert "chat_template.jinja" in caught.value.fix


@pytest.mark.parametrize("template", [CHATML.replace("<|im_end|>", ""), MARKED.replace(ENDS, "{{ message.content }}")])
def test_an_answer_needs_an_end(template: str) -> None:
    with pytest.raises(UserError, match="gives an answer no end"):
        _ = foreign(template).chat


def test_a_tokenizer_without_a_template() -> None:
    with pytest.raises(UserError, match="has no chat template") as caught:
        _ = foreign("").chat
    assert "chat_template.jinja" in caught.value.fix


def test_several_templates_are_for_the_reader_to_choose(tmp_path: Path) -> None:
    foreign("").save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": "a", "template": "b"}]}')
    with pytest.raises(UserError, match="several chat templates"):
        Tokenizer.load(tmp_path)


def test_a_template_cannot_reach_the_program() -> None:
    evil = CHATML + "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(UserError, match="the chat template writes no answer"):
        _ = foreign(evil).chat
