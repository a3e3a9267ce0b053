"""What a stranger gets wrong: every problem at once, each with key, value, origin and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.config.names import ALIASES, known_keys, suggestion
from lumina.config.resolve import resolve
from lumina.errors import UserError


def problems(source: str, *given: str) -> list[str]:
    """The lines of the error, without its title."""
    with pytest.raises(UserError) as error:
        resolve(source, given)
    title, *lines = str(error.value).splitlines()
    assert title == f"the configuration has {'a problem' if len(lines) == 1 else f'{len(lines)} problems'}:"
    assert all(line.startswith("  - ") for line in lines)
    return [line.removeprefix("  - ") for line in lines]


class TestNames:
    @pytest.mark.parametrize(("key", "meant"), [
        ("learning_rate", "train.lr"),
        ("train.learning_rate", "train.lr"),
        ("lr", "train.lr"),
        ("model.lr", "train.lr"),
        ("train.Lr", "train.lr"),
        ("train.lrr", "train.lr"),
        ("learning-rate", "train.lr"),
        ("hidden_size", "model.width"),
        ("n_layer", "model.layers"),
        ("hiden_size", "model.width"),
        ("moe.ffn", "model.moe.ffn"),
        ("model.experts", "model.moe.experts"),
        ("model.moe.num_experts", "model.moe.experts"),
        ("checkpoints.every", "checkpoint.every"),
        ("modle.width", "model.width"),
        ("epochs", "train.steps"),
        ("ffn", "model.ffn or model.moe.ffn"),
    ])  # fmt: skip
    def test_what_was_probably_meant(self, key: str, meant: str) -> None:
        assert problems("debug", f"{key}=3") == [f"{key}=3 (command line): unknown key; did you mean {meant}?"]

    def test_no_guess_is_better_than_a_wild_one(self) -> None:
        assert problems("debug", "xyzzy=1") == ["xyzzy=1 (command line): unknown key"]

    def test_aliases_name_real_keys_and_none_is_a_key_itself(self) -> None:
        assert set(ALIASES) <= set(known_keys())
        words = [word for words in ALIASES.values() for word in words.split()]
        assert len(words) == len(set(words))
        assert not set(words) & {key.rpartition(".")[2] for key in known_keys()}
        assert all(suggestion(word) == f"; did you mean {key}?" for key in ALIASES for word in ALIASES[key].split())

    def test_a_section_is_not_a_key(self) -> None:
        assert problems("debug", "train=3", "model.moe=null") == [
            "train (command line): a section; set the keys in it, such as train.steps",
            "model.moe (command line): a section; set the keys in it, such as model.moe.experts",
        ]


class TestValues:
    def test_all_at_once_in_all_sections(self) -> None:
        number = "a number is needed, such as 0.1, 3e-4 or 5%"
        whole = "a whole number is needed, such as 300, 4k or 2B"
        auto = "auto or a whole number of at least 1 is needed"
        cases = {
            "model.tied=maybe": "must be true or false",
            "model.rope_theta=0": "must be more than 0",
            "model.mod.capacity=1.5": "must be at most 1",
            "data.train=[]": "must not be empty",
            "data.tokenizer=3": "a path is needed; quote a name that looks like a number",
            "train.steps=1.5": whole,
            "train.micro_batch=many": auto,
            "train.lr=fast": number,
            "train.optimizer=lion": "must be muon or adamw",
            "train.decay=100%": "a share of the run below 1 (0.05, 5%) or whole steps (200) is needed",
            "train.betas=[0.9]": "two numbers are needed, such as [0.9, 0.95]",
            "train.eps=''": number,
            "train.clip=-1": "must be more than 0",
            "train.seed=true": whole,
            "precision.mode=fp8": "must be auto, fp32, bf16, fp16 or bf16_pure",
            "checkpoint.every=often": "auto or a whole number of steps is needed",
            "checkpoint.mtbf=never": "a duration is needed, such as 90s, 2h, 1h30m or 1.5d",
            "checkpoint.keep_last=0": "must be at least 1",
            "telemetry.log_every=0": "must be at least 1",
            "parallel.device=tpu": "must be auto, cpu, cuda or mps",
            "parallel.threads=0": auto,
        }
        assert problems("debug", *cases) == [f"{given} (command line): {what}" for given, what in cases.items()]

    @pytest.mark.parametrize(("given", "problem"), [
        ("train.seed=9223372036854775808", "must be below 9.22337e+18"),
        ("train.time=2 hours", "a duration is needed, such as 90s, 2h, 1h30m or 1.5d"),
        ("train.steps=1e400", "a whole number is needed, such as 300, 4k or 2B"),
        ("train.lr={a: 1}", "a number is needed, such as 0.1, 3e-4 or 5%"),
        ("train.steps=0", "must be at least 1"),
        ("train.warmup=-5%", "must be at least 0"),
        ("model.vocab=255", "must be at least 260"),
        ("model.kind=hybird", "must be dense, moe, mod or hybrid"),
        ("train.betas=[0.9, 1]", "both must be at least 0 and below 1"),
    ])  # fmt: skip
    def test_one_value(self, given: str, problem: str) -> None:
        (line,) = problems("debug", given)
        assert line.endswith(f" (command line): {problem}")

    def test_an_empty_value_is_shown(self) -> None:
        assert problems("debug", "train.lr=")[0].startswith("train.lr='' (command line): a number is needed")

    def test_settings_that_are_none(self) -> None:
        lines = problems("debug", "train.lr", "train.lr=1", "train.lr=2", "data.train=[a", "train.clip=x")
        assert lines == [
            "train.lr: a setting is key=value, such as train.steps=300",
            "train.lr: given twice on the command line",
            "data.train=[a: expected ',' or ']', but got '<stream end>'; "
            "a text with brackets needs quotes: data.train='\"…\"'",
            "train.clip=x (command line): a number is needed, such as 0.1, 3e-4 or 5%",
        ]


class TestCombinations:
    """The shape of debug is 256-token sequences, 6 layers, 8 experts, batches of 8192 tokens."""

    SHAPE = (
        "model.seq_len=256",
        "model.layers=6",
        "model.heads=4",
        "model.kv_heads=2",
        "train.batch_tokens=8192",
    )

    @pytest.mark.parametrize(("given", "problem"), [
        ("model.width=100", "grouped matmul needs a multiple of 8; use 96 or 104"),
        ("model.moe.ffn=12", "grouped matmul needs a multiple of 8; use 8 or 16"),
        ("model.head_dim=7", "rotary positions turn pairs; use 6 or 8"),
        ("model.kv_heads=3", "each key-value head serves equally many heads; use kv_heads 2 or 4"),
        ("model.kv_heads=8", "each key-value head serves equally many heads; use kv_heads 4"),
        (
            "model.moe.top_k=1",
            "a normalised top-1 gate gives its router no gradient; use 2 or more, or normalise=false",
        ),
        ("model.moe.dense_layers=6", "no block would have experts; use dense_layers 5 or less"),
        ("model.moe.top_k=9", "there are not so many experts; use top_k 4 or less"),
        ("model.mod.every=7", "no block would be routed; use every 6 or less"),
        ("train.batch_tokens=1000", "a batch is whole sequences; use train.batch_tokens=768 or 1024"),
        ("train.batch_tokens=100", "a batch is whole sequences; use train.batch_tokens=256"),
        ("train.micro_batch=7", "does not divide the 32 sequences of a batch; use 4 or 8"),
        ("train.micro_batch=64", "does not divide the 32 sequences of a batch; use 32"),
        ("train.warmup=0.7", "together longer than the run; shorten one"),
        ("train.warmup=100k", "together longer than the run; shorten one"),
    ])  # fmt: skip
    def test_one_that_cannot_be(self, given: str, problem: str) -> None:
        key = given.partition("=")[0]
        (line,) = problems("debug", *(s for s in self.SHAPE if s.partition("=")[0] != key), given)
        values, _, message = line.partition(": ")
        assert message == problem
        assert f"{given} (command line)" in values

    @pytest.mark.parametrize(("phases", "mode", "problem"), [
        ("[{at: 0.1}]", "base", "the first begins `at` 0, and each later one after the one before it"),
        ("[{}, {at: 0.5}, {at: 100}]", "base", "the first begins `at` 0, and each later one after the one before it"),
        ("[{}, {at: 0}]", "base", "the first begins `at` 0, and each later one after the one before it"),
        ("[{}, {at: 200}]", "base", "the last would begin when the run of 200 steps is over"),
        ("[{data: chat}]", "base", "there is no chat in this mode"),
        ("[{data: text}, {at: 50%, data: chat}]", "finetune", "there is no text in this mode"),
    ])  # fmt: skip
    def test_phases_that_cannot_be(self, phases: str, mode: str, problem: str) -> None:
        (line,) = problems("debug", "train.steps=200", f"data.mode={mode}", f"train.phases={phases}")
        assert "train.phases=" in line
        assert line.endswith(f": {problem}")
        assert ("data.mode" in line) == ("mode" in problem)

    @pytest.mark.parametrize(("phases", "key"), [
        ("[{at: 0, nope: 1}]", "nope"),
        ("[{at: 100%}]", "at"),
        ("[{data: code}]", "data"),
        ("[{lr: 0}]", "lr"),
        ("3", ""),
    ])  # fmt: skip
    def test_phases_that_are_none(self, phases: str, key: str) -> None:
        (line,) = problems("debug", "train.steps=200", f"train.phases={phases}")
        assert line.startswith("train.phases")
        assert key in line

    def test_phases_that_can_be(self) -> None:
        given = ["train.steps=200", "data.mode=hybrid_sequential"]
        phases = "train.phases=[{data: text}, {at: 50%, data: chat, lr: 1e-3, warmup: 10}, {at: 190, data: both}]"
        made = resolve("debug", [*given, phases]).config.train.phases
        assert [(phase.at, phase.data, phase.lr, phase.warmup) for phase in made] == [
            (0, "text", None, None),
            (0.5, "chat", 1e-3, 10),
            (190, "both", None, None),
        ]

    def test_they_name_every_value_and_its_origin(self, tmp_path: Path) -> None:
        file = tmp_path / "my.yaml"
        file.write_text("model: {seq_len: 100}\n")
        (line,) = problems(str(file), "train.batch_tokens=1k", "train.micro_batch=3", "model.seq_len=300")
        assert line.startswith("train.batch_tokens=1k (command line), model.seq_len=300 (command line): ")
        (line,) = problems(str(file), "train.batch_tokens=1050")
        assert line.startswith(f"train.batch_tokens=1050 (command line), model.seq_len=100 (file {file}): ")

    def test_a_bad_section_does_not_hide_another(self) -> None:
        lines = problems("tiny", "data.train=[]", "model.moe.top_k=9", "train.batch_tokens=100", "nope=1")
        assert [line.split("=")[0] for line in lines] == [
            "nope",
            "model.moe.top_k",
            "data.train",
            "train.batch_tokens",
        ]

    def test_warmup_in_steps_against_a_run_in_tokens(self) -> None:
        settings = ("train.batch_tokens=8k", "model.seq_len=250", "train.warmup=100", "train.decay=0")
        assert problems("debug", "train.tokens=799_999", *settings)
        assert resolve("debug", ["train.tokens=800_000", *settings])


class TestLengthAndKind:
    def test_two_lengths_from_one_place(self) -> None:
        line = "train.steps, train.tokens (command line): exactly one says how long to train"
        assert problems("debug", "train.tokens=2B", "train.steps=3") == [line]

    def test_no_length(self) -> None:
        (line,) = problems("debug", "train.steps=null")
        assert line.endswith(": exactly one of them says how long to train")

    @pytest.mark.parametrize(("kind", "given", "use"), [
        ("dense", "model.moe.experts=4", "leave it out, or set model.kind=moe or hybrid"),
        ("moe", "model.mod.capacity=0.5", "leave it out, or set model.kind=mod or hybrid"),
        ("hybrid", "model.ffn=512", "leave it out, set model.moe.ffn, or set model.kind=dense or mod"),
    ])  # fmt: skip
    def test_a_key_of_another_kind(self, tmp_path: Path, kind: str, given: str, use: str) -> None:
        line = f"{given} (command line): a {kind} model has no use for it; {use}"
        assert problems("debug", f"model.kind={kind}", given) == [line]
        key, _, value = given.partition("=")
        (tmp_path / "my.yaml").write_text(f"{key}: {value}\n")
        assert problems(f"{tmp_path}/my.yaml", f"model.kind={kind}") == [
            line.replace("command line", f"file {tmp_path}/my.yaml")
        ]

    def test_an_unknown_kind_is_the_only_problem(self) -> None:
        assert len(problems("debug", "model.kind=hybird", "model.moe.experts=4", "model.ffn=512")) == 1


@pytest.mark.parametrize(("source", "message", "fix"), [
    ("debgu", "unknown preset 'debgu'", "did you mean debug? the presets are tiny, debug, debug_200m"),
    ("b7000", "unknown preset 'b7000'", "the presets are tiny, debug"),
    ("nothere.yaml", "nothere.yaml: cannot be read: No such file or directory", "name a preset: tiny, debug"),
    ("configs/mine", "configs/mine: cannot be read: No such file or directory", "check the path"),
    ("folder.yml", "folder.yml: cannot be read: Is a directory", "check the path"),
    ("list.yaml", "list.yaml: no sections in it", "write `train:`"),
    ("runs/old", "runs/old: cannot be read: Is a directory", "`lumina resume runs/old` goes on with it"),
    ("twice.yaml", "twice.yaml: line 3: the key 'lr' is given twice", "mend it: keep one of them"),
    ("both.yaml", "both.yaml: train.lr: given twice", "keep one"),
    ("latin.yaml", "latin.yaml: not UTF-8 text (byte 8)", "save the file as UTF-8"),
    ("star.yaml", "star.yaml: line 1: expected alphabetic or numeric character", "quotes around"),
    ("extends.yaml", "extends.yaml: unknown preset 'tiyn'", "did you mean tiny?"),
    ("child.yaml", "child.yaml: unknown preset 'extends.yaml'", "a file extends one of the presets: tiny, debug"),
    ("newer.yaml", "newer.yaml: schema_version is 2", "use the version that wrote the file"),
])  # fmt: skip
def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str, fix: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.yml").mkdir()
    Path("runs/old").mkdir(parents=True)
    Path("runs/old/config.yaml").touch()
    for name, text in {
        "list": "- a\n- b\n",
        "twice": "train:\n  lr: 1\n  lr: 2\n",
        "both": "train: {lr: 1}\ntrain.lr: 2\n",
        "star": "data: {train: *.txt}\n",
        "extends": "extends: tiyn\n",
        "child": "extends: extends.yaml\n",
        "newer": "schema_version: 2\n",
    }.items():
        Path(f"{name}.yaml").write_text(text)
    Path("latin.yaml").write_bytes(b"data: {\xe9: 1}\n".replace(b"{", b"{ "))
    with pytest.raises(UserError) as error:
        resolve(source)
    assert error.value.message.startswith(message)
    assert fix in error.value.fix


words = st.sampled_from([*known_keys(), "lr", "train", "model.moe", "nope", ""]) | st.text(max_size=8)
values = st.sampled_from(
    ["1", "0", "-1", "2.5", "auto", "[]", "{}", "null", "true", "5%", "[a, b]", "4k", "x"]
) | st.text(max_size=8)


@settings(deadline=None)
@given(st.lists(st.tuples(words, values).map("=".join) | words, max_size=5), st.sampled_from(["debug", "tiny"]))
def test_whatever_is_typed_the_answer_is_a_configuration_or_a_user_error(given: list[str], source: str) -> None:
    message = ""
    try:
        resolve(source, given)
    except UserError as error:
        message = str(error)
    assert all(line.startswith("  - ") for line in message.splitlines()[1:])
