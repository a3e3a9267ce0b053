"""Conversations with a model that answers, in templates of somebody else: what these refuse or trim changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support import model_config
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HuggingFace

from lumina.data.records import Message
from lumina.data.tokenizer import Tokenizer
from lumina.errors import UserError
from lumina.inference.conversation import Conversation, Turn
from lumina.inference.engine import Model
from lumina.inference.sampler import Sampler
from lumina.model.transformer import Transformer

# Like that of Llama 2: no system turn, the roles alternate, what is said is trimmed.
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[' + m['content'] | trim + ']' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture
def conversation() -> Conversation:
    inner = HuggingFace(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    tokenizer = Tokenizer(inner, chat_template=STRICT, settings={"bos_token": "<s>", "eos_token": "</s>"})
    model = Model(Transformer(model_config("dense")).eval(), tokenizer, 0, [], talks=True)
    return Conversation(model, Sampler(), max_tokens=4, seed=0)


def turns(*texts: str) -> list[Turn]:
    return [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]


def read(conversation: Conversation) -> str:
    """What the model would read, special tokens included."""
    ids, _ = conversation.prompt(conversation.turns)
    return str(conversation.model.tokenizer._inner.decode(ids, skip_special_tokens=False))


def ignore(piece: str) -> None:
    pass


def interrupt(piece: str) -> None:
    raise KeyboardInterrupt


def test_an_answer_with_outer_white_space_is_trimmed_as_the_template_does(conversation: Conversation) -> None:
    conversation.turns = turns("a", "\n b ", "c")
    assert read(conversation) == "<s>[a] b</s><s>[c]"
    conversation.answer("d", ignore)
    assert conversation.turns[1].text == "\n b "


def test_lines_without_an_answer_between_are_one_turn(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt may come before any text of an answer."""
    with monkeypatch.context() as patch:
        patch.setattr(Model, "stream_ids", lambda *_: (interrupt("") for _ in range(1)))
        with pytest.raises(KeyboardInterrupt):
            conversation.answer("a", ignore)
    assert [turn.role for turn in conversation.turns] == ["user"]
    conversation.answer("b", ignore)
    assert [turn.text for turn in conversation.turns[:2]] == ["a", "b"]
    conversation.turns = conversation.turns[:2]
    assert read(conversation) == "<s>[a\nb]"
    assert conversation.transcript() == "<s>[a\nb]"
    assert [message["content"] for message in conversation.messages()] == ["a", "b"]


def say_system(conversation: Conversation) -> None:
    conversation.set_system("Be brief.")


def begin_with_an_answer(conversation: Conversation) -> None:
    conversation.turns = [Turn("assistant", "a")]
    conversation.answer("b", ignore)


def save_it(conversation: Conversation) -> None:
    conversation.turns = [Turn("assistant", "a")]
    conversation.transcript()


@pytest.mark.parametrize("act", [say_system, begin_with_an_answer, save_it])
def test_what_the_template_refuses_changes_nothing(
    act: Callable[[Conversation], None], conversation: Conversation
) -> None:
    with pytest.raises(UserError, match="the chat template refuses it: roles must alternate") as caught:
        act(conversation)
    assert "/reset" in caught.value.fix
    assert conversation.system == ""
    assert conversation.turns in ([], [Turn("assistant", "a")])
    conversation.set_system("")
    conversation.reset()
    assert conversation.answer("hello", ignore).prompt_tokens == len("<[hello]")


def test_an_empty_line_before_any_other(conversation: Conversation) -> None:
    with pytest.raises(UserError, match="nothing to answer yet"):
        conversation.answer("", ignore)


def test_an_answer_ends_where_the_template_ends_it(conversation: Conversation) -> None:
    tokenizer = conversation.model.tokenizer
    assert conversation.model.stop_ids == {tokenizer.specials["</s>"]}
    ((ids, _),) = tokenizer.chat.encode([[Message("user", "a"), Message("assistant", "b")]])
    assert ids[-1] in conversation.model.stop_ids
