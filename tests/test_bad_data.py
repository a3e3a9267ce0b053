"""Data that cannot be learnt from as it is, and requests that do not fit it: through `train`, `data` and `lora`.

Each row is a name, how to make the situation, the command line, and what the answer must hold: what is wrong, where,
and what to do. Nothing may be left behind: no run, no half of anything.
"""

from __future__ import annotations

import errno
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import contents, write_chats, write_text

from lumina.cli import main
from lumina.data.tokenizer import SPECIALS, train_bpe

Prepare = Callable[[Path, pytest.MonkeyPatch], object]
TINY = ["train", "tiny", "train.steps=4", "model.kind=dense"]
TEXT = [*TINY, "data.train=text.txt"]
CHAT = [*TINY, "data.mode=finetune"]
BOTH = [*TINY, "data.train=[text.txt, chats.jsonl]"]
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
GOOD = json.dumps({"messages": [USER, ANSWER]})
FLAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
TURNS = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"


def put(name: str, *lines: object) -> Prepare:
    """A file of these lines: bytes, text, or what JSON has."""

    def line(content: object) -> bytes:
        if isinstance(content, bytes):
            return content
        return (content if isinstance(content, str) else json.dumps(content)).encode()

    return lambda here, _: (here / name).write_bytes(b"".join(line(content) + b"\n" for content in lines))


def turns(*messages: object) -> Prepare:
    """A file whose third line is this conversation."""
    return put("b.jsonl", GOOD, "", {"messages": messages})


def nothing(here: Path, _: pytest.MonkeyPatch) -> None:
    """The situation is in the command line."""


def cut(name: str, pack: Callable[[bytes], bytes], content: str = "chats.jsonl") -> Prepare:
    """The first two thirds of a packed file."""

    def prepare(here: Path, _: pytest.MonkeyPatch) -> None:
        packed = pack((here / content).read_bytes())
        (here / name).write_bytes(packed[: len(packed) * 2 // 3])

    return prepare


def flipped(path: str) -> Prepare:
    """One bit in the middle of a file is another one."""

    def prepare(here: Path, _: pytest.MonkeyPatch) -> None:
        content = bytearray((here / path).read_bytes())
        content[len(content) // 2] ^= 1
        (here / path).write_bytes(bytes(content))

    return prepare


def zstd(content: bytes) -> bytes:
    import zstandard

    packed: bytes = zstandard.compress(content)
    return packed


def parquet(content: bytes) -> bytes:
    pyarrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    sink = pyarrow.BufferOutputStream()
    pq.write_table(pyarrow.table({"text": content.decode().splitlines()}), sink)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


def columns(here: Path, _: pytest.MonkeyPatch) -> None:
    pyarrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pyarrow.table({"body": ["a"], "id": [1]}), here / "b.parquet")


def unreadable(name: str) -> Prepare:
    """Permission bits do not bind who runs tests as root."""

    def prepare(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        opened = Path.open

        def guarded(self: Path, *rest: Any, **more: Any) -> Any:
            if self.name == name:
                raise OSError(errno.EACCES, "Permission denied", str(self))
            return opened(self, *rest, **more)

        monkeypatch.setattr(Path, "open", guarded)

    return prepare


def tokenizer(template: str = "", settings: str = "", own: bool = False) -> Prepare:
    """A tokenizer in `tok`; without its `own` tokens for roles it is somebody else's."""

    def prepare(here: Path, _: pytest.MonkeyPatch) -> None:
        train_bpe([(here / "text.txt").read_text()], 300).save(here / "tok")
        path = here / "tok" / "tokenizer.json"
        content = json.loads(path.read_text())
        if not own:
            content["added_tokens"] = content["added_tokens"][:1]
            for token in SPECIALS[1:]:
                content["model"]["vocab"][token.strip("<>")] = content["model"]["vocab"].pop(token)
        path.write_text(json.dumps(content))
        (here / "tok" / "chat_template.jinja").unlink()
        if template:
            (here / "tok" / "chat_template.jinja").write_text(template)
        if settings:
            (here / "tok" / "tokenizer_config.json").write_text(settings)

    return prepare


def no_checkpoint(here: Path, _: pytest.MonkeyPatch) -> None:
    shutil.rmtree(here / "runs/base/checkpoints")


CASES: list[tuple[str, Prepare, list[str], list[str]]] = [
    # -- files
    ("a line that is not UTF-8", put("b.jsonl", GOOD, b'{"messages": "d\xe9"}'), [*CHAT, "data.train=b.jsonl"], []),
    ("blank lines alone", put("b.jsonl", "", " "), [*CHAT, "data.train=b.jsonl"], []),
    ("empty texts alone", put("b.jsonl", {"text": ""}), [*TINY, "data.train=b.jsonl"], []),
    ("an empty gzip", lambda here, _: (here / "b.jsonl.gz").touch(), [*CHAT, "data.train=b.jsonl.gz"], []),
    ("an unreadable text", unreadable("text.txt"), TEXT, []),
    ("an unreadable jsonl", unreadable("chats.jsonl"), [*CHAT, "data.train=chats.jsonl"], []),
    ("a cut gzip", cut("b.jsonl.gz", gzip.compress), [*CHAT, "data.train=b.jsonl.gz"], []),
    ("a cut gzip of text", cut("b.txt.gz", gzip.compress, "text.txt"), [*TINY, "data.train=b.txt.gz"], []),
    ("no gzip", put("b.txt.gz", "plain"), [*TINY, "data.train=b.txt.gz"], []),
    ("a damaged gzip", lambda here, _: (put("b.jsonl.gz", gzip.compress((here / "chats.jsonl").read_bytes()))(here, _), flipped("b.jsonl.gz")(here, _)), [*CHAT, "data.train=b.jsonl.gz"], []),
    ("a cut zstd", cut("b.jsonl.zst", zstd), [*CHAT, "data.train=b.jsonl.zst"], []),
    ("no zstd", put("b.txt.zst", "plain"), [*TINY, "data.train=b.txt.zst"], []),
    ("a cut parquet", cut("b.parquet", parquet, "text.txt"), [*TINY, "data.train=b.parquet"], []),
    ("no parquet", put("b.parquet", "plain"), [*TINY, "data.train=b.parquet"], []),
    ("parquet of other columns", columns, [*TINY, "data.train=b.parquet"], []),
    ("parquet in gzip", put("b.parquet.gz", "plain"), [*TINY, "data.train=b.parquet.gz"], []),
    ("an array without end", put("b.json", '[{"text": "a"},'), [*TINY, "data.train=b.json"], []),
    ("text behind an array", put("b.json", '[{"text": "a"}] b'), [*TINY, "data.train=b.json"], []),
    ("a number in an array", put("b.json", '[{"text": "a"}, 3]'), [*TINY, "data.train=b.json"], []),
    ("a file given twice", nothing, [*TINY, "data.train=[text.txt, ./text.txt]"], []),
    ("held out and trained on", nothing, [*TEXT, "data.eval=text.txt"], []),
    ("a folder of pictures", lambda here, _: ((here / "pics").mkdir(), (here / "pics/a.png").touch()), [*TINY, "data.train=pics"], []),
    ("no pattern matches", nothing, [*CHAT, "data.train=[chats.jsonl, '*.ndjson']"], []),
    ("a hub data set without a name", nothing, [*TINY, "data.train=hub:@train"], []),
    # -- records
    ("messages that are none", put("b.jsonl", {"messages": "Hi"}), [*CHAT, "data.train=b.jsonl"], []),
    ("no messages", turns(), [*CHAT, "data.train=b.jsonl"], []),
    ("a turn that is none", turns("Hi", ANSWER), [*CHAT, "data.train=b.jsonl"], []),
    ("a turn without a role", turns({"content": "Hi"}, ANSWER), [*CHAT, "data.train=b.jsonl"], []),
    ("content that is a number", turns({"role": "user", "content": 3}, ANSWER), [*CHAT, "data.train=b.jsonl"], []),
    ("a picture", turns({"role": "user", "content": [{"type": "image_url"}]}, ANSWER), [*CHAT, "data.train=b.jsonl"], []),
    ("an unknown role", turns({"role": "robot", "content": "Hi"}, ANSWER), [*CHAT, "data.train=b.jsonl"], []),
    ("no assistant turn", turns(USER), [*CHAT, "data.train=b.jsonl"], []),
    ("an empty assistant turn", turns(USER, {"role": "assistant", "content": " "}), [*CHAT, "data.train=b.jsonl"], []),
    ("a late system turn", turns(USER, {"role": "system", "content": "x"}, ANSWER), [*CHAT, "data.train=b.jsonl"], []),
    ("an empty output", put("b.jsonl", {"instruction": "Add.", "output": ""}), [*CHAT, "data.train=b.jsonl"], []),
    ("a prompt alone", put("b.jsonl", {"prompt": "Add."}), [*CHAT, "data.train=b.jsonl"], []),
    ("formats mixed", put("b.jsonl", GOOD, {"text": "a"}), [*CHAT, "data.train=b.jsonl"], []),
    ("one too many", put("b.jsonl", GOOD, "{", "[", GOOD, "3"), [*CHAT, "data.train=b.jsonl", "data.skip_bad=2"], []),
    # -- what fits what
    ("some weights", nothing, [*TINY, "data.train=[text.txt:0.7, chats.jsonl]"], []),
    ("weight 0", nothing, [*TINY, "data.train=[text.txt:0, chats.jsonl:1]"], []),
    ("weights of held-out files", nothing, [*TEXT, "data.eval=other.txt:0.5"], []),
    ("finetune with texts", nothing, [*BOTH, "data.mode=finetune"], []),
    ("finetune with nothing but text", nothing, [*CHAT, "data.train=text.txt"], []),
    ("base with conversations", nothing, BOTH, []),
    ("hybrid without conversations", nothing, [*TEXT, "data.mode=hybrid_interleaved"], []),
    ("hybrid without texts", nothing, [*CHAT, "data.mode=hybrid_sequential", "data.train=chats.jsonl"], []),
    ("held out of another kind", nothing, [*TEXT, "data.eval=chats.jsonl"], []),
    ("unknown mode", nothing, [*TEXT, "data.mode=chat"], []),
    ("a ratio of all", nothing, [*BOTH, "data.mode=hybrid_interleaved", "data.base_ratio=1"], []),
    ("every conversation too long", put("b.jsonl", *[{"prompt": "x" * 500, "completion": f"y{i}"} for i in range(90)]), [*CHAT, "data.train=b.jsonl"], []),
    ("one conversation", put("b.jsonl", GOOD), [*CHAT, "data.train=b.jsonl"], []),
    ("all removed", nothing, [*TEXT, "data.quality.min_chars=9M"], []),
    # -- phases
    ("phases out of order", nothing, [*BOTH, "data.mode=hybrid_sequential", "train.phases=[{data: text}, {at: 0.9}, {at: 0.5}]"], []),
    ("a late first phase", nothing, [*BOTH, "data.mode=hybrid_sequential", "train.phases=[{at: 1}]"], []),
    ("a phase beyond the end", nothing, [*BOTH, "data.mode=hybrid_sequential", "train.phases=[{data: text}, {at: 9, data: chat}]"], []),
    ("an unknown key in a phase", nothing, [*BOTH, "data.mode=hybrid_sequential", "train.phases=[{data: text, rate: 1}]"], []),
    ("a phase of nothing known", nothing, [*BOTH, "data.mode=hybrid_sequential", "train.phases=[{data: code}]"], []),
    ("a phase of another mode", nothing, [*TEXT, "train.phases=[{data: chat}]"], []),
    ("phases that are none", nothing, [*TEXT, "train.phases=[text, chat]"], []),
    ("phases that are a mapping", nothing, [*TEXT, "train.phases={data: text}"], []),
    ("a phase of negative rate", nothing, [*TEXT, "train.phases=[{lr: -1}]"], []),
    ("a phase that only warms up", nothing, [*TEXT, "train.phases=[{warmup: 9}]"], []),
    # -- train.init_from
    ("begin with no run", nothing, [*CHAT, "data.train=chats.jsonl", "train.init_from=runs/bose"], []),
    ("begin with a file", nothing, [*CHAT, "data.train=chats.jsonl", "train.init_from=text.txt"], []),
    ("begin with no checkpoint", no_checkpoint, [*CHAT, "data.train=chats.jsonl", "train.init_from=runs/base"], []),
    ("begin with a checkpoint that is gone", nothing, [*CHAT, "data.train=chats.jsonl", "train.init_from=runs/base/checkpoints/step-000009"], []),
    ("begin with a damaged checkpoint", flipped("runs/base/checkpoints/step-000004/state.json"), [*CHAT, "data.train=chats.jsonl", "train.init_from=runs/base/checkpoints/step-000004"], []),
    ("begin with other tokens", tokenizer(own=True), [*CHAT, "data.train=chats.jsonl", "train.init_from=runs/base", "data.tokenizer=tok"], []),
    ("begin with adapters", nothing, [*CHAT, "data.train=chats.jsonl", "train.init_from=runs/tuned"], []),
    ("begin with a wider model", nothing, [*CHAT, "data.train=chats.jsonl", "train.init_from=runs/base", "model.width=128"], []),
    ("begin with a lost tokenizer", lambda here, _: shutil.rmtree(here / "runs/base/tokenizer"), [*CHAT, "data.train=chats.jsonl", "train.init_from=runs/base"], []),
    # -- adapters
    ("a negative rank", nothing, [*TEXT, "train.init_from=runs/base", "train.lora.rank=-1"], []),
    ("half a rank", nothing, [*TEXT, "train.init_from=runs/base", "train.lora.rank=1.5"], []),
    ("a rank larger than the matrices", nothing, [*TEXT, "train.init_from=runs/base", "train.lora.rank=4000"], []),
    ("a rank beyond all", nothing, [*TEXT, "train.init_from=runs/base", "train.lora.rank=5000"], []),
    ("no alpha", nothing, [*TEXT, "train.init_from=runs/base", "train.lora.rank=4", "train.lora.alpha=0"], []),
    ("adapters on nothing", nothing, [*TEXT, "train.lora.rank=4"], []),
    ("merge no run", nothing, ["lora", "merge", "runs/tuend"], []),
    ("merge without adapters", nothing, ["lora", "merge", "runs/base"], []),
    ("merge twice", lambda here, _: (here / "runs/tuned-merged").mkdir(), ["lora", "merge", "runs/tuned"], []),
    ("export without adapters", nothing, ["lora", "export", "runs/base", "--out", "adapter"], []),
    ("export over a folder", lambda here, _: (here / "adapter").mkdir(), ["lora", "export", "runs/tuned", "--out", "adapter"], []),
    ("export without a checkpoint", lambda here, _: shutil.rmtree(here / "runs/tuned/checkpoints"), ["lora", "export", "runs/tuned", "--out", "adapter"], []),
    ("export below a file", nothing, ["lora", "export", "runs/tuned", "--out", "text.txt/adapter"], []),
    # -- templates
    ("no chat template", tokenizer(), [*CHAT, "data.train=chats.jsonl", "data.tokenizer=tok"], []),
    ("a broken template", tokenizer("{% for m in %}"), [*CHAT, "data.train=chats.jsonl", "data.tokenizer=tok"], []),
    ("a template without an end", tokenizer(FLAT), [*CHAT, "data.train=chats.jsonl", "data.tokenizer=tok"], []),
    ("a template that fails", tokenizer("{{ messages[0]['content'] + 3 }}"), [*CHAT, "data.train=chats.jsonl", "data.tokenizer=tok"], []),
    ("a template of a filter unknown", tokenizer(TURNS + "{{ messages | nonsense }}"), [*CHAT, "data.train=chats.jsonl", "data.tokenizer=tok"], []),
    ("a template that refuses", tokenizer(TURNS + "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}"), [*CHAT, "data.train=chats.jsonl", "data.tokenizer=tok"], []),
    ("a template that divides by zero", tokenizer(TURNS + "{{ 1 // 0 }}"), [*CHAT, "data.train=chats.jsonl", "data.tokenizer=tok"], []),
    ("a template that never ends", tokenizer(TURNS + "{% for i in range(10 ** 9) %}{% endfor %}"), [*CHAT, "data.train=chats.jsonl", "data.tokenizer=tok"], []),
    ("settings of a tokenizer that are none", tokenizer(settings="[]"), [*CHAT, "data.train=chats.jsonl", "data.tokenizer=tok"], []),
    ("settings of other types", tokenizer(TURNS, settings='{"eos_token": {"a": 1}}'), [*CHAT, "data.train=chats.jsonl", "data.tokenizer=tok"], []),
    ("many templates", tokenizer(settings='{"chat_template": [{"name": "a", "template": "x"}]}'), [*CHAT, "data.train=chats.jsonl", "data.tokenizer=tok"], []),
    ("a template that is not UTF-8", lambda here, p: (tokenizer()(here, p), (here / "tok/chat_template.jinja").write_bytes(b"\xff")), [*CHAT, "data.train=chats.jsonl", "data.tokenizer=tok"], []),
    # -- shards
    ("a curriculum without difficulty", nothing, [*TINY, "data.train=shards", "data.curriculum.until=0.5"], []),
    ("a curriculum of files", nothing, [*TEXT, "data.curriculum.until=0.5"], []),
    ("a curriculum longer than the run", nothing, [*TEXT, "data.curriculum.until=9"], []),
    ("damaged tokens", flipped("shards/0.text.train.tokens"), [*TINY, "data.train=shards"], []),
    ("damaged facts of shards", flipped("shards/meta.json"), [*TINY, "data.train=shards"], []),
    ("facts of shards that are none", put("shards/meta.json", "[]"), [*TINY, "data.train=shards"], []),
    ("a shard that is gone", lambda here, _: (here / "shards/0.text.train.tokens").unlink(), [*TINY, "data.train=shards"], []),
    ("a damaged tokenizer of shards", put("shards/tokenizer.json", "{}"), [*TINY, "data.train=shards"], []),
    ("shards of another tokenizer", tokenizer(own=True), [*TINY, "data.train=shards", "data.tokenizer=tok"], []),
    ("shards as held-out data", nothing, [*TEXT, "data.eval=shards"], []),
    ("shards twice", nothing, [*TINY, "data.train=[shards, shards]"], []),
    ("shards without facts", lambda here, _: (here / "shards/meta.json").unlink(), [*TINY, "data.train=shards"], []),
    ("texts in shards for finetune", nothing, [*CHAT, "data.train=shards"], []),
    ("shards of a larger vocabulary", lambda here, _: main(["data", "prepare", "text.txt", "--out", "large", "--vocab", "400"]), [*TINY, "data.train=large"], []),
    # -- lumina data
    ("show nothing there", nothing, ["data", "show", "gone.jsonl"], []),
    ("show a folder without text", lambda here, _: (here / "none").mkdir(), ["data", "show", "none"], []),
    ("show an empty file", put("e.jsonl", ""), ["data", "show", "e.jsonl"], []),
    ("show shards", nothing, ["data", "show", "shards"], []),
    ("show with no tokenizer", nothing, ["data", "show", "text.txt", "--tokenizer", "gone.json"], []),
    ("show conversations without template", tokenizer(), ["data", "show", "chats.jsonl", "--tokenizer", "tok"], []),
    ("check nothing there", nothing, ["data", "check", "gone.jsonl"], []),
    ("check what is broken", put("b.jsonl", GOOD, "{"), ["data", "check", "b.jsonl"], []),
    ("check one too many", put("b.jsonl", GOOD, "{", "{"), ["data", "check", "b.jsonl", "--skip-bad", "1"], []),
    ("check shards", nothing, ["data", "check", "shards"], []),
    ("check lengths without tokens", nothing, ["data", "check", "chats.jsonl", "--seq-len", "64"], []),
    ("check what a template refuses", tokenizer(FLAT), ["data", "check", "chats.jsonl", "--tokenizer", "tok"], []),
    ("check a pattern", nothing, ["data", "check", "*.ndjson"], []),
    ("prepare nothing there", nothing, ["data", "prepare", "gone.txt", "--out", "new"], []),
    ("prepare what is broken", put("b.jsonl", "{"), ["data", "prepare", "b.jsonl", "--out", "new"], []),
    ("prepare into a full folder", nothing, ["data", "prepare", "text.txt", "--out", "runs"], []),
    ("prepare into a file", nothing, ["data", "prepare", "text.txt", "--out", "other.txt"], []),
    ("prepare below a file", nothing, ["data", "prepare", "text.txt", "--out", "other.txt/new"], []),
    ("prepare shards", nothing, ["data", "prepare", "shards", "--out", "new"], []),
    ("prepare with a weight", nothing, ["data", "prepare", "text.txt:0.5", "--out", "new"], []),
    ("prepare with a key of training", nothing, ["data", "prepare", "text.txt", "--out", "new", "train.lr=1"], []),
    ("prepare with a wrong limit", nothing, ["data", "prepare", "text.txt", "--out", "new", "data.quality.near=2"], []),
    ("prepare nothing", nothing, ["data", "prepare", "data.skip_bad=1", "--out", "new"], []),
    ("prepare with few ids", nothing, ["data", "prepare", "text.txt", "--out", "new", "--vocab", "100"], []),
    ("prepare with endless ids", nothing, ["data", "prepare", "text.txt", "--out", "new", "--vocab", "-1"], []),
    ("prepare what holds nothing out", put("b.txt", "word"), ["data", "prepare", "b.txt", "--out", "new", "--vocab", "260"], []),
    ("difficulty of nothing", nothing, ["data", "difficulty", "gone", "--by", "length"], []),
    ("difficulty of a text", nothing, ["data", "difficulty", "text.txt", "--by", "length"], []),
    ("difficulty of a run", nothing, ["data", "difficulty", "runs/base", "--by", "rarity"], []),
    ("difficulty of damaged shards", flipped("shards/0.text.train.tokens"), ["data", "difficulty", "shards", "--by", "rarity"], []),
    ("difficulty by taste", nothing, ["data", "difficulty", "shards", "--by", "taste"], []),
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, conversations, shards, a run of texts and one of adapters on top of it."""
    here = tmp_path_factory.mktemp("made")
    write_text(here)
    write_chats(here)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        (here / "other.txt").write_text("a text of other words\n" * 500)
        assert main(TEXT) == 0
        next(Path("runs").iterdir()).rename("runs/base")
        adapted = ["data.train=chats.jsonl", "train.init_from=runs/base", "train.lora.rank=2"]
        assert main([*CHAT, *adapted]) == 0
        next(path for path in Path("runs").iterdir() if path.name != "base").rename("runs/tuned")
        assert main(["data", "prepare", "text.txt", "--out", "shards", "--vocab", "260"]) == 0
    return here


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of it, which is the current folder."""
    folder = tmp_path / "here"
    shutil.copytree(made, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(("prepare", "arguments", "needles"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_the_answer(
    prepare: Prepare,
    arguments: list[str],
    needles: list[str],
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        prepare(here, patch)
        before = contents(here)
        code = main(arguments)
    said = capsys.readouterr()
    if not needles:
        import os
        with open("/tmp/wt-bad-probe.txt", "a") as f:
            name = os.environ["PYTEST_CURRENT_TEST"]
            changed = {k for k in set(before) | set(contents(here)) if before.get(k) != contents(here).get(k)}
            f.write(f"## {name}\n{' '.join(arguments)}\n-> {code} {len(said.err)} {'CHANGED ' + str(sorted(changed)[:9]) if changed else ''} {'TRACE' if 'Traceback' in said.err else ''}\n{said.err if code == 2 else said.err + said.out[-600:]}\n")
    assert code == 2
    assert "Traceback" not in said.err + said.out
    missing = [needle for needle in needles if needle not in said.err]
    assert not missing, said.err
    assert len(said.err) < 1500, "more than anybody reads"
    assert contents(here) == before
