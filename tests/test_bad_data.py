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
from support import require_refusal, write_chats, write_text

from lumina.cli import main
from lumina.data.tokenizer import SPECIALS, train_bpe

Prepare = Callable[[Path, pytest.MonkeyPatch], object]
TINY = ["train", "tiny", "train.steps=4", "model.kind=dense"]
TEXT = [*TINY, "data.train=text.txt"]
CHAT = [*TINY, "data.mode=finetune"]
BOTH = [*TINY, "data.train=[text.txt, chats.jsonl]"]
BAD_CHAT, BEGIN = [*CHAT, "data.train=b.jsonl"], [*CHAT, "data.train=chats.jsonl"]
FOREIGN = [*BEGIN, "data.tokenizer=tok"]
PHASED = [*BOTH, "data.mode=hybrid_sequential"]
ADAPT = [*TEXT, "train.init_from=runs/base"]
LAST = "runs/base/checkpoints/step-000004"
EXPORT = ["lora", "export", "runs/tuned", "--out", "adapter"]
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
GOOD = json.dumps({"messages": [USER, ANSWER]})
ONE_TURN = "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}"
LONG = [{"prompt": "x" * 500, "completion": f"y{i}"} for i in range(90)]
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
            if str(self) == name:
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


def foreign_bytes(here: Path, patch: pytest.MonkeyPatch) -> None:
    tokenizer()(here, patch)
    (here / "tok/chat_template.jinja").write_bytes(b"\xff")


def pictures(here: Path, _: pytest.MonkeyPatch) -> None:
    (here / "pics").mkdir()
    (here / "pics/a.png").touch()


def gone(path: str) -> Prepare:
    """A file or a folder is not there any more."""
    return lambda here, _: shutil.rmtree(here / path) if (here / path).is_dir() else (here / path).unlink()


def large(here: Path, _: pytest.MonkeyPatch) -> None:
    assert main(["data", "prepare", "text.txt", "--out", "large", "--vocab", "400"]) == 0


CASES: list[tuple[str, Prepare, list[str], list[str]]] = [
    # -- files
    ("a line that is not UTF-8", put("b.jsonl", GOOD, b'{"messages": "d\xe9"}'), BAD_CHAT,
     ["b.jsonl:2: not UTF-8, byte 0xe9 at offset 109", "skip_bad"]),
    ("blank lines alone", put("b.jsonl", "", " "), BAD_CHAT, ["data.train: no document has any text"]),
    ("empty texts alone", put("b.jsonl", {"text": ""}), [*TINY, "data.train=b.jsonl"],
     ["data.train: no document has any text"]),
    ("an empty gzip", lambda here, _: (here / "b.jsonl.gz").touch(), [*CHAT, "data.train=b.jsonl.gz"],
     ["b.jsonl.gz: the file is empty"]),
    ("an unreadable text", unreadable("text.txt"), TEXT, ["text.txt: Permission denied", "make the file readable"]),
    ("an unreadable jsonl", unreadable("chats.jsonl"), [*CHAT, "data.train=chats.jsonl"],
     ["chats.jsonl: Permission denied", "make the file readable"]),
    ("a cut gzip", cut("b.jsonl.gz", gzip.compress), [*CHAT, "data.train=b.jsonl.gz"],
     ["b.jsonl.gz: the file ends in the middle (gzip)", "records before that were read", "fix:"]),
    ("a cut gzip of text", cut("b.txt.gz", gzip.compress, "text.txt"), [*TINY, "data.train=b.txt.gz"],
     ["b.txt.gz: the file ends in the middle (gzip)"]),
    ("no gzip", put("b.txt.gz", "plain"), [*TINY, "data.train=b.txt.gz"],
     ["b.txt.gz: not readable as gzip, Not a gzipped file"]),
    ("a damaged gzip", put("b.txt.gz", gzip.compress(b"words")[:-8] + bytes(8)), [*TINY, "data.train=b.txt.gz"],
     ["b.txt.gz: not readable as gzip, CRC check failed"]),
    ("a cut zstd", cut("b.jsonl.zst", zstd), [*CHAT, "data.train=b.jsonl.zst"],
     ["b.jsonl.zst: the file ends in the middle (zstd)"]),
    ("no zstd", put("b.txt.zst", "plain"), [*TINY, "data.train=b.txt.zst"], ["b.txt.zst: not readable as zstd"]),
    ("a cut parquet", cut("b.parquet", parquet, "text.txt"), [*TINY, "data.train=b.parquet"],
     ["b.parquet: the file ends in the middle or is damaged (parquet)"]),
    ("no parquet", put("b.parquet", "plain"), [*TINY, "data.train=b.parquet"],
     ["b.parquet: the file ends in the middle or is damaged (parquet)"]),
    ("parquet of other columns", columns, [*TINY, "data.train=b.parquet"],
     ["b.parquet:1: must have the key", "its keys: body, id"]),
    ("parquet in gzip", put("b.parquet.gz", "plain"), [*TINY, "data.train=b.parquet.gz"],
     ["b.parquet.gz: parquet inside .gz", "unpack it"]),
    ("an array without end", put("b.json", '[{"text": "a"},'), [*TINY, "data.train=b.json"],
     ["b.json:2: not JSON, Expecting value", "the rest of the file cannot be read; 1 records before"]),
    ("text behind an array", put("b.json", '[{"text": "a"}] b'), [*TINY, "data.train=b.json"],
     ["b.json:1: not JSON, Extra data at column 17"]),
    ("a number in an array", put("b.json", '[{"text": "a"}, 3]'), [*TINY, "data.train=b.json"],
     ["b.json:1: must be an object", "is a number"]),
    ("a file given twice", nothing, [*TINY, "data.train=[text.txt, ./text.txt]"],
     ["./text.txt: text.txt is already given by 'text.txt'", "give every file once"]),
    ("held out and trained on", nothing, [*TEXT, "data.eval=text.txt"],
     ["text.txt is already given by 'text.txt'", "leave them out of data.train and data.eval"]),
    ("a folder of pictures", pictures, [*TINY, "data.train=pics"],
     ["pics: the folder has no files that can be read", "only others such as pics/a.png"]),
    ("no pattern matches", nothing, [*CHAT, "data.train=[chats.jsonl, '*.ndjson']"], ["*.ndjson: no file matches"]),
    ("a hub data set without a name", nothing, [*TINY, "data.train=hub:@train"],
     ["hub:@train: a data set of the hub is given as hub:OWNER/NAME"]),
    # -- records
    ("messages that are none", put("b.jsonl", {"messages": "Hi"}), BAD_CHAT,
     ['b.jsonl:1: "messages" must be an array of turns, is a string']),
    ("no messages", turns(), BAD_CHAT, ['b.jsonl:3: "messages" is empty']),
    ("a turn that is none", turns("Hi", ANSWER), BAD_CHAT,
     ["b.jsonl:3: messages[0] must be an object with role and content, is a string"]),
    ("a turn without a role", turns({"content": "Hi"}, ANSWER), BAD_CHAT,
     ['b.jsonl:3: messages[0] has no "role"; its keys: content']),
    ("content that is a number", turns({"role": "user", "content": 3}, ANSWER), BAD_CHAT,
     ['b.jsonl:3: messages[0]: "content" must be a string, is a number']),
    ("a picture", turns({"role": "user", "content": [{"type": "image_url"}]}, ANSWER), BAD_CHAT,
     ["b.jsonl:3: messages[0].content[0]: a part of type 'image_url'; only text"]),
    ("an unknown role", turns({"role": "robot", "content": "Hi"}, ANSWER), BAD_CHAT,
     ["b.jsonl:3: messages[0]: unknown role 'robot'; known are system, user, assistant"]),
    ("no assistant turn", turns(USER), BAD_CHAT,
     ['b.jsonl:3: "messages" has no assistant turn, there is nothing to learn']),
    ("an empty assistant turn", turns(USER, {"role": "assistant", "content": " "}), BAD_CHAT,
     ["b.jsonl:3: messages[1]: the assistant's turn is empty"]),
    ("a late system turn", turns(USER, {"role": "system", "content": "x"}, ANSWER), BAD_CHAT,
     ["b.jsonl:3: messages[1]: a system turn that is not the first one"]),
    ("an empty output", put("b.jsonl", {"instruction": "Add.", "output": ""}), BAD_CHAT,
     ['b.jsonl:1: "output" is empty, there is nothing to learn']),
    ("a prompt alone", put("b.jsonl", {"prompt": "Add."}), BAD_CHAT,
     ["b.jsonl:1: must have the key", "its keys: prompt"]),
    ("formats mixed", put("b.jsonl", GOOD, {"text": "a"}), BAD_CHAT,
     ['b.jsonl:2: is a record of format "text", but this file began with "messages"']),
    ("one too many", put("b.jsonl", GOOD, "{", "[", GOOD, "3"), [*CHAT, "data.train=b.jsonl", "data.skip_bad=2"],
     ["b.jsonl:5: must be an object", "besides 2 records that data.skip_bad=2 tolerates"]),
    # -- what fits what
    ("some weights", nothing, [*TINY, "data.train=[text.txt:0.7, chats.jsonl]"],
     ["data.train=", "give every source a weight, or none"]),
    ("weight 0", nothing, [*TINY, "data.train=[text.txt:0, chats.jsonl:1]"],
     ["data.train=", "a weight is more than 0; leave out what is not wanted"]),
    ("weights of held-out files", nothing, [*TEXT, "data.eval=other.txt:0.5"],
     ["data.eval=other.txt:0.5", "leave the weights out"]),
    ("finetune with texts", nothing, [*BOTH, "data.mode=finetune"],
     ["data.mode=finetune reads conversations", "text.txt holds texts", "data.mode=hybrid_interleaved"]),
    ("finetune with nothing but text", nothing, [*CHAT, "data.train=text.txt"],
     ["text.txt holds texts", "there are no conversations", "data.mode=base"]),
    ("base with conversations", nothing, BOTH,
     ["data.mode=base reads texts", "chats.jsonl holds conversations (messages)", "hybrid_interleaved"]),
    ("hybrid without conversations", nothing, [*TEXT, "data.mode=hybrid_interleaved"],
     ["data.mode=hybrid_interleaved reads", "there are no conversations", "data.mode=base"]),
    ("hybrid without texts", nothing, [*TINY, "data.mode=hybrid_sequential", "data.train=chats.jsonl"],
     ["data.mode=hybrid_sequential reads", "there are no texts", "data.mode=finetune"]),
    ("unknown mode", nothing, [*TEXT, "data.mode=chat"], ["data.mode=chat (command line): must be base, finetune,"]),
    ("a ratio of all", nothing, [*BOTH, "data.mode=hybrid_interleaved", "data.base_ratio=1"],
     ["data.base_ratio=1 (command line): must be below 1"]),
    ("every conversation too long", put("b.jsonl", *LONG), BAD_CHAT, ["no window of chat", "model.seq_len"]),
    ("one conversation", put("b.jsonl", GOOD), BAD_CHAT, ["nothing can be held out of so little", "data.eval=FILE"]),
    ("all removed", nothing, [*TEXT, "data.quality.min_chars=9M"],
     ["data.train: data.quality removes every document", "less strictly"]),
    # -- phases
    ("phases out of order", nothing, [*PHASED, "train.phases=[{data: text}, {at: 0.9}, {at: 0.5}]"],
     ["train.phases=", "each later one after the one before it"]),
    ("a late first phase", nothing, [*PHASED, "train.phases=[{at: 1}]"], ["train.phases=", "the first begins `at` 0"]),
    ("a phase beyond the end", nothing, [*PHASED, "train.phases=[{data: text}, {at: 9, data: chat}]"],
     ["train.phases=", "when the run of 4 steps is over"]),
    ("an unknown key in a phase", nothing, [*PHASED, "train.phases=[{data: text, rate: 1}]"],
     ["train.phases.rate (command line): unknown; a phase has at, data, lr and warmup"]),
    ("a phase of nothing known", nothing, [*PHASED, "train.phases=[{data: code}]"],
     ["train.phases.data (command line): must be text, chat or both"]),
    ("a phase of another mode", nothing, [*TEXT, "train.phases=[{data: chat}]"],
     ["train.phases=[{data: chat}]", "data.mode=base", "there is no chat in this mode"]),
    ("phases that are none", nothing, [*TEXT, "train.phases=[text, chat]"],
     ["a problem", "settings are needed, such as {at: 0.7, data: chat}"]),
    ("phases that are a mapping", nothing, [*TEXT, "train.phases={data: text}"],
     ["train.phases={data: text} (command line): a list is needed"]),
    ("a phase of negative rate", nothing, [*TEXT, "train.phases=[{lr: -1}]"],
     ["train.phases.lr (command line): must be more than 0"]),
    ("a phase that only warms up", nothing, [*TEXT, "train.phases=[{warmup: 9}]"],
     ["train.phases=", "the warm-up of the phase that begins at 0 is longer"]),
    # -- train.init_from
    ("begin with no run", nothing, [*BEGIN, "train.init_from=runs/bose"],
     ["runs/bose: no such run", "did you mean runs/base?"]),
    ("begin with a file", nothing, [*BEGIN, "train.init_from=text.txt"], ["text.txt: no such run", "lumina runs"]),
    ("begin with no checkpoint", gone("runs/base/checkpoints"), [*BEGIN, "train.init_from=runs/base"],
     ["train.init_from: runs/base: no complete checkpoint", "until it saves one"]),
    ("begin with a checkpoint that is gone", nothing, [*BEGIN, "train.init_from=runs/base/checkpoints/step-000009"],
     ["step-000009: no such checkpoint", "name a step-… folder"]),
    ("begin with a damaged checkpoint", flipped(f"{LAST}/state.json"), [*BEGIN, f"train.init_from={LAST}"],
     ["damaged checkpoint", "state.json has other bytes", "name another one"]),
    ("begin with other tokens", tokenizer(own=True), [*BEGIN, "train.init_from=runs/base", "data.tokenizer=tok"],
     ["data.tokenizer=tok: another tokenizer than that of train.init_from=runs/base", "leave"]),
    ("begin with adapters", nothing, [*BEGIN, "train.init_from=runs/tuned"],
     ["runs/tuned holds adapters beside its weights", "lumina lora merge runs/tuned"]),
    ("begin with a wider model", nothing, [*BEGIN, "train.init_from=runs/base", "model.width=128"],
     ["step-000004: saved from another model", "[128, 64]", "leave out the keys"]),
    ("begin with a lost tokenizer", gone("runs/base/tokenizer"), [*BEGIN, "train.init_from=runs/base"],
     ["runs/base/tokenizer: the run's tokenizer is gone", "restore it"]),
    # -- adapters
    ("a negative rank", nothing, [*ADAPT, "train.lora.rank=-1"],
     ["train.lora.rank=-1 (command line): must be at least 0"]),
    ("half a rank", nothing, [*ADAPT, "train.lora.rank=1.5"],
     ["train.lora.rank=1.5 (command line): a whole number is needed"]),
    ("a rank larger than the matrices", nothing, [*ADAPT, "train.lora.rank=4000"],
     ["train.lora.rank=4000", "model.width=64 (preset tiny)", "use at most 64"]),
    ("a rank beyond all", nothing, [*ADAPT, "train.lora.rank=5000"],
     ["train.lora.rank=5000 (command line): must be at most 4096"]),
    ("no alpha", nothing, [*ADAPT, "train.lora.rank=4", "train.lora.alpha=0"],
     ["train.lora.alpha=0 (command line): must be more than 0"]),
    ("merge no run", nothing, ["lora", "merge", "runs/tuend"], ["runs/tuend: no such run", "did you mean runs/tuned?"]),
    ("merge without adapters", nothing, ["lora", "merge", "runs/base"],
     ["runs/base: this run has no adapters", "train.lora.rank above 0"]),
    ("merge twice", lambda here, _: (here / "runs/tuned-merged").mkdir(), ["lora", "merge", "runs/tuned"],
     ["runs/tuned-merged: exists already", "move it away"]),
    ("export without adapters", nothing, ["lora", "export", "runs/base", "--out", "adapter"],
     ["runs/base: this run has no adapters", "train.lora.rank above 0"]),
    ("export over a folder", lambda here, _: (here / "adapter").mkdir(), EXPORT,
     ["adapter: exists already", "move it away"]),
    ("export without a checkpoint", gone("runs/tuned/checkpoints"), EXPORT,
     ["runs/tuned: no complete checkpoint", "lumina resume runs/tuned"]),
    ("export below a file", nothing, ["lora", "export", "runs/tuned", "--out", "text.txt/adapter"],
     ["text.txt/adapter", "Not a directory", "check the path"]),
    # -- templates
    ("no chat template", tokenizer(), FOREIGN,
     ["tok/tokenizer.json has no chat template", "put chat_template.jinja beside tokenizer.json"]),
    ("a broken template", tokenizer("{% for m in %}"), FOREIGN,
     ["the chat template is not Jinja: Expected an expression", "mend chat_template.jinja"]),
    ("a template without an end", tokenizer(FLAT), FOREIGN,
     ["the chat template gives an answer no end", "special token behind an answer"]),
    ("a template that fails", tokenizer("{{ messages[0]['content'] + 3 }}"), FOREIGN,
     ["the chat template", "can only concatenate str", "mend chat_template.jinja"]),
    ("a template of a filter unknown", tokenizer(TURNS + "{{ messages | nonsense }}"), FOREIGN,
     ["No filter named 'nonsense'", "mend chat_template.jinja"]),
    ("a template that refuses", tokenizer(TURNS + ONE_TURN), FOREIGN,
     ["chats.jsonl:1: the chat template refuses it: one turn", "there may be more"]),
    ("a template that divides by zero", tokenizer(TURNS + "{{ 1 // 0 }}"), FOREIGN,
     ["the chat template", "division", "mend chat_template.jinja"]),
    ("a template that never ends", tokenizer(TURNS + "{% for i in range(10 ** 9) %}{% endfor %}"), FOREIGN,
     ["the chat template", "Range too big", "mend chat_template.jinja"]),
    ("settings of a tokenizer that are none", tokenizer(settings="[]"), FOREIGN,
     ["tok: the settings of its tokenizer cannot be read", "mend its tokenizer_config"]),
    ("settings of other types", tokenizer(TURNS, settings='{"eos_token": {"a": 1}}'), FOREIGN,
     ["tok: the settings of its tokenizer cannot be read", "content", "mend its tokenizer_config"]),
    ("many templates", tokenizer(settings='{"chat_template": [{"name": "a", "template": "x"}]}'), FOREIGN,
     ["tok/tokenizer_config.json: several chat templates", "put the one to use"]),
    ("a template that is not UTF-8", foreign_bytes, FOREIGN,
     ["tok: the settings of its tokenizer cannot be read", "or its chat_template.jinja"]),
    # -- shards
    ("a curriculum without difficulty", nothing, [*TINY, "data.train=shards", "data.curriculum.until=0.5"],
     ["data.curriculum: shards has no difficulty", "lumina data difficulty DIR"]),
    ("a curriculum of files", nothing, [*TEXT, "data.curriculum.until=0.5"],
     ["data.curriculum: text.txt has no difficulty", "lumina data prepare"]),
    ("damaged tokens", flipped("shards/0.text.train.tokens"), [*TINY, "data.train=shards"],
     ["shards: damaged shards: 0.text.train.tokens does not match its hash", "prepare them again"]),
    ("damaged facts of shards", flipped("shards/meta.json"), [*TINY, "data.train=shards"],
     ["shards: damaged shards: meta.json does not match its hash", "prepare them again"]),
    ("facts of shards that are none", put("shards/meta.json", "[]"), [*TINY, "data.train=shards"],
     ["shards/meta.json: cannot be read", "prepare it again"]),
    ("a shard that is gone", gone("shards/0.text.train.tokens"), [*TINY, "data.train=shards"],
     ["shards: damaged shards", "0.text.train.tokens", "prepare them again"]),
    ("a damaged tokenizer of shards", put("shards/tokenizer.json", "{}"), [*TINY, "data.train=shards"],
     ["shards: damaged shards: tokenizer.json does not match its hash", "fix:"]),
    ("shards of another tokenizer", tokenizer(own=True), [*TINY, "data.train=shards", "data.tokenizer=tok"],
     ["shards: prepared with another tokenizer than tok", "leave data.tokenizer out"]),
    ("shards as held-out data", nothing, [*TEXT, "data.eval=shards"],
     ["shards: prepared shards bring their own held-out side", "give files to data.eval"]),
    ("shards twice", nothing, [*TINY, "data.train=[shards, ./shards]"],
     ["./shards: is already given by 'shards'; give every folder once"]),
    ("texts in shards for finetune", nothing, [*CHAT, "data.train=shards"],
     ["data.mode=finetune reads conversations", "shards holds texts", "data.mode=base"]),
    ("shards of a larger vocabulary", large, [*TINY, "data.train=large", "model.vocab=300"],
     ["model.vocab=300 is smaller than the vocabulary of the shards: 3", "leave model.vocab"]),
    # -- lumina data
    ("show nothing there", nothing, ["data", "show", "gone.jsonl"],
     ["gone.jsonl: no such file or folder", "there is no document in this", "give files"]),
    ("show a folder without text", lambda here, _: (here / "none").mkdir(), ["data", "show", "none"],
     ["none: the folder has no files that can be read", "give files"]),
    ("show an empty file", lambda here, _: (here / "e.jsonl").touch(), ["data", "show", "e.jsonl"],
     ["e.jsonl: the file is empty", "give files"]),
    ("show shards", nothing, ["data", "show", "shards"],
     ["shards: prepared shards; give the files that they were made of"]),
    ("show with no tokenizer", nothing, ["data", "show", "text.txt", "--tokenizer", "gone.json"],
     ["gone.json: no such tokenizer file", "or bpe"]),
    ("show conversations without template", tokenizer(), ["data", "show", "chats.jsonl", "--tokenizer", "tok"],
     ["tok/tokenizer.json has no chat template", "put chat_template.jinja beside"]),
    ("check nothing there", nothing, ["data", "check", "gone.jsonl"],
     ["gone.jsonl: no such file or folder", "not usable as it is", "mend what is listed"]),
    ("check what is broken", put("b.jsonl", GOOD, "{"), ["data", "check", "b.jsonl"],
     ["b.jsonl:2: not JSON", "not usable as it is: 1 good document, 1 bad record", "data.skip_bad=1"]),
    ("check one too many", put("b.jsonl", GOOD, "{", "{"), ["data", "check", "b.jsonl", "--skip-bad", "1"],
     ["b.jsonl:3: not JSON", "2 bad records of 1 tolerated", "data.skip_bad=2"]),
    ("check shards", nothing, ["data", "check", "shards"],
     ["shards: prepared shards; give the files that they were made of"]),
    ("check lengths without tokens", nothing, ["data", "check", "chats.jsonl", "--seq-len", "64"],
     ["--seq-len counts tokens", "--tokenizer FILE"]),
    ("check what a template refuses", tokenizer(FLAT), ["data", "check", "chats.jsonl", "--tokenizer", "tok"],
     ["the chat template gives an answer no end", "special token behind an answer"]),
    ("check a pattern", nothing, ["data", "check", "*.ndjson"], ["*.ndjson: no file matches", "mend what is listed"]),
    ("prepare nothing there", nothing, ["data", "prepare", "gone.txt", "--out", "new"],
     ["gone.txt: no such file or folder", "fix:"]),
    ("prepare what is broken", put("b.jsonl", "{"), ["data", "prepare", "b.jsonl", "--out", "new"],
     ["b.jsonl:1: not JSON", "skip_bad"]),
    ("prepare into a full folder", nothing, ["data", "prepare", "text.txt", "--out", "runs"],
     ["runs: there is something else", "give a new folder with --out"]),
    ("prepare into a file", nothing, ["data", "prepare", "text.txt", "--out", "other.txt"],
     ["other.txt: there is something else", "give a new folder with --out"]),
    ("prepare below a file", nothing, ["data", "prepare", "text.txt", "--out", "other.txt/new"],
     ["the folder other.txt cannot be written", "give another folder with --out"]),
    ("prepare shards", nothing, ["data", "prepare", "shards", "--out", "new"],
     ["shards: prepared already", "give the files it was made of, or train on it"]),
    ("prepare with a weight", nothing, ["data", "prepare", "text.txt:0.5", "--out", "new"],
     ["text.txt:0.5: a weight is not for preparing", "leave it out"]),
    ("prepare with a key of training", nothing, ["data", "prepare", "text.txt", "--out", "new", "train.lr=1"],
     ["train.lr=1: preparing does not read this key", "data.quality.*"]),
    ("prepare with a wrong limit", nothing, ["data", "prepare", "text.txt", "--out", "new", "data.quality.near=2"],
     ["data.quality.near=2 (command line): must be at most 1"]),
    ("prepare nothing", nothing, ["data", "prepare", "data.skip_bad=1", "--out", "new"],
     ["there is nothing to prepare", "give files, folders or globs"]),
    ("prepare with few ids", nothing, ["data", "prepare", "text.txt", "--out", "new", "--vocab", "100"],
     ["--vocab", "greater than or equal to 260"]),
    ("difficulty of nothing", nothing, ["data", "difficulty", "gone", "--by", "length"],
     ["gone: not a folder of prepared shards", "lumina data prepare"]),
    ("difficulty of a text", nothing, ["data", "difficulty", "text.txt", "--by", "length"],
     ["text.txt: not a folder of prepared shards", "lumina data prepare"]),
    ("difficulty of a run", nothing, ["data", "difficulty", "runs/base", "--by", "rarity"],
     ["runs/base: not a folder of prepared shards", "lumina data prepare"]),
    ("difficulty of damaged shards", flipped("shards/0.text.train.tokens"),
     ["data", "difficulty", "shards", "--by", "rarity"],
     ["shards: damaged shards: 0.text.train.tokens does not match", "prepare them again"]),
    ("difficulty by taste", nothing, ["data", "difficulty", "shards", "--by", "taste"], ["--by", "'length', 'rarity'"]),
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
        require_refusal(here, arguments, needles, capsys, output=True)


def test_the_vocabulary_follows_larger_shards(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(here.iterdir())
    large(here, monkeypatch)
    assert set(here.iterdir()) - before == {here / "large"}, "no lock is left"
    assert main([*TINY, "data.train=large"]) == 0
    (run,) = here.glob("runs/tiny-*")
    assert "of the shards, rounded up" in (run / "config.yaml").read_text()


def test_there_are_no_two_of_a_name() -> None:
    assert len({case[0] for case in CASES}) == len(CASES)
