"""`lumina data show | check | prepare | difficulty`."""

from __future__ import annotations

import json as documents
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lumina.cli.options import Seed
from lumina.cli.output import Json, print_json, print_table
from lumina.config.weights import split_weight
from lumina.errors import UserError
from lumina.run.exit_codes import INTERRUPTED
from lumina.visible import visible

if TYPE_CHECKING:
    from lumina.config.schema.data import DataConfig
    from lumina.data.corpus import Corpus, Shard
    from lumina.data.look import Checked, Example, Figures, Finding
    from lumina.telemetry.console import Console

Specs = Annotated[list[str], typer.Argument(help="Files, folders, globs; as in data.train.", show_default=False)]
SETTINGS = ("data.eval", "data.tokenizer", "data.skip_bad", "data.buffer", "data.quality.")  # that preparing reads
BAD_SHOWN = 20
BAR = 40  # characters
OPEN, CLOSE = "⟦", "⟧"


def show(
    specs: Specs,
    examples: Annotated[int, typer.Option(min=0, help="How many documents, spread over all.")] = 3,
    tokenizer: Annotated[str, typer.Option(help="A tokenizer.json, a run's folder, or bpe: one of this data.")] = "bpe",
    seq_len: Annotated[int, typer.Option(min=2, help="Count what is longer.")] = 2048,
    train_on: Annotated[Literal["assistant", "all"], typer.Option(help="Which turns count.")] = "assistant",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """What data holds: formats, counts, lengths, and examples in which the tokens that are learnt stand out."""
    from lumina.data import look

    bad: list[Finding] = []
    with _console(json or not sys.stdout.isatty()) as console:
        shown = look.show(
            specs, bad.append, tokenizer=tokenizer, seq_len=seq_len, train_on=train_on,
            examples=examples, seed=seed, progress=console.progress,
        )  # fmt: skip
    if json:
        print_json(_shown(shown.tokenizer, shown.sources, shown.examples, bad))
    else:
        _say(f"tokenizer  {shown.tokenizer}")
        for source in shown.sources:
            _say_figures(source, seq_len)
        for number, example in enumerate(shown.examples, 1):
            _say_example(example, f"example {number} of {len(shown.examples)}")
        _say_bad(bad)
    if not any(source.documents for source in shown.sources):
        raise UserError("there is no document in this", fix="give files with text or conversations")


def check(
    specs: Specs,
    seq_len: Annotated[int, typer.Option(min=0, help="Say which conversations are longer; needs --tokenizer.")] = 0,
    tokenizer: Annotated[str, typer.Option(help="A tokenizer.json, a run's folder, or bpe; checks its template.")] = "",
    skip_bad: Annotated[int, typer.Option(min=0, help="Bad records that do not matter, as data.skip_bad.")] = 0,
    json: Json = False,
) -> None:
    """Say all that is wrong with data, one line each; exits with 2 if it is not usable as it is."""
    from lumina.data import look

    found: list[Finding] = []
    with _console(json or not sys.stdout.isatty()) as console:
        above = console.show if console.screen and console.screen.live else None  # of the line that says how far it is
        say = above or typer.echo

        def tell(finding: Finding) -> None:
            if json:
                found.append(finding)
            else:
                say(visible(finding.line))

        checked = look.check(
            specs, tell, tokenizer=tokenizer, seq_len=seq_len, skip_bad=skip_bad, progress=console.progress
        )
    summary = _summary(checked, skip_bad)
    if json:
        print_json({**asdict(checked), "findings": [finding._asdict() for finding in found]})
    if not checked.usable:
        tolerated = f" or give it data.skip_bad={checked.bad_records}" if not checked.bad_files else ""
        fix = f"mend what is listed,{tolerated}" if checked.documents and tolerated else "mend what is listed"
        raise UserError(f"not usable as it is: {summary}", fix)
    if not json:
        typer.echo(f"usable: {summary}")


def prepare(
    specs: Annotated[list[str], typer.Argument(help="Files, folders, globs, and data.* keys: data.quality.exact=true")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    eval: Annotated[list[str] | None, typer.Option(help="Held-out files; without, a part is held out.")] = None,
    tokenizer: Annotated[str, typer.Option(help="A tokenizer.json, a folder with one, or bpe: made of this.")] = "bpe",
    vocab: Annotated[int, typer.Option(min=260, help="Ids of a tokenizer that is made.")] = 32768,
    json: Json = False,
) -> None:
    """Write shards: token ids on disk that every run can train on. The same command goes on after a stop."""
    from lumina.data.shards import prepare_folder

    data, start = _data_config(specs, eval or [], tokenizer), time.perf_counter()
    try:
        with _console(json) as console:
            corpus, already = prepare_folder(data, out, vocab=vocab, progress=console.progress)
    except KeyboardInterrupt:
        typer.echo("\nstopped; the same command goes on from here", err=True)
        raise typer.Exit(INTERRUPTED) from None
    seconds = time.perf_counter() - start
    told = _prepared(corpus, out, already, seconds)
    told["nothing_of"] = [
        name
        for name, _ in map(split_weight, (*data.train, *data.eval))
        if name not in {source["name"] for source in told["sources"]}
    ]
    if json:
        print_json(told)
        return
    if already:
        typer.echo(f"prepared already: {out} was made of the same")
    _say_prepared(told)
    typer.echo(f"next   lumina train debug {shlex.quote(f'data.train={out}')}{_mode(corpus)}")


def difficulty(
    folder: Annotated[Path, typer.Argument(help="A folder of `lumina data prepare`.")],
    by: Annotated[Literal["length", "rarity"], typer.Option(help="Tokens, or how rare they are on average.")],
    json: Json = False,
) -> None:
    """Write how difficult each document is, so that data.curriculum can begin with the easy ones."""
    from lumina.data import difficulty as room

    with _console(json) as console:
        written = room.write(folder, by, console.progress)
    if json:
        print_json({**asdict(written), "at": room.QUANTILES})
        return
    typer.echo(f"{'wrote' if written.changed else 'there already:'} the difficulty by {by} of {folder}")
    header = ["source", "kind", "documents", *(f"{q:.0%}" for q in room.QUANTILES)]
    rows = [
        [visible(s.source), s.kind, f"{s.documents:,}", *(f"{value:.4g}" for value in s.quantiles)]
        for s in written.spreads
    ]
    print_table(header, rows, left=2)
    for spread in written.spreads:
        for name, some in (("easiest", spread.easiest), ("hardest", spread.hardest)):
            for document in some:
                text = " ".join(document.text.split())
                _say(f"{name}  {document.difficulty:8.4g}  {text if len(text) <= 60 else text[:59] + '…'}")
    typer.echo(f"next   lumina train debug {shlex.quote(f'data.train={folder}')} data.curriculum.until=0.3")


# -- how they are told --------------------------------------------------------------------------------------


def _console(quiet: bool) -> Console:
    from lumina.telemetry.console import Console

    return Console(1, quiet=quiet)


def _say(line: str) -> None:
    typer.echo(visible(line))


def _some(count: int, one: str, many: str = "") -> str:
    """1 file, 1,204 files"""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _shown(
    tokenizer: str, sources: Sequence[Figures], examples: Sequence[Example], bad: Sequence[Finding]
) -> dict[str, Any]:
    figures = [{**vars(s), "lengths": {str(1 << k): s.lengths[k] for k in sorted(s.lengths)}} for s in sources]
    told = [{**example._asdict(), "runs": [run._asdict() for run in example.runs]} for example in examples]
    return {
        "tokenizer": tokenizer,
        "sources": figures,
        "examples": told,
        "problems": [finding._asdict() for finding in bad],
    }


def _say_figures(source: Figures, seq_len: int) -> None:
    from lumina.telemetry.figures import size

    typer.echo()
    _say(f"{source.name}  {'; '.join(_formats(source)) or 'nothing'}")
    if not source.documents:
        return
    typer.echo(
        f"  {size(source.bytes)}, {source.tokens:,} tokens, {source.bytes / source.tokens:.2f} bytes a token, "
        f"{source.trained / source.tokens:.1%} of them trained on"
    )
    typer.echo(
        f"  {source.longer:,} longer than {seq_len:,} tokens, {_some(source.duplicates, 'exact duplicate')}, "
        f"{source.empty:,} empty"
    )
    for line in _histogram(source):
        typer.echo(line)


def _formats(source: Figures) -> Iterator[str]:
    """Each format with what it has, in words."""
    chats = [name for name in source.formats if name != "text"]
    if texts := source.formats["text"]:
        yield f"text: {_some(texts, 'document')}"
    for name in chats:
        words = _some(source.formats[name], "conversation")
        if len(chats) == 1:
            words += f", {source.turns / source.conversations:.1f} turns on average"
            words += f", {source.system:,} with a system turn" if source.system else ""
        yield f"{name}: {words}"


def _histogram(source: Figures) -> Iterator[str]:
    """Documents by their tokens, a line a power of two; at most 80 columns."""
    yield "  tokens a document"
    most = max(source.lengths.values())
    for power in range(min(source.lengths), max(source.lengths) + 1):
        low, high, count = 1 << power, (2 << power) - 1, source.lengths[power]
        bar = "#" * max(count > 0, round(BAR * count / most))
        yield f"  {f'{low}-{high}' if power else '1':>15}  {count:>11,}  {bar}".rstrip()


def _say_example(example: Example, title: str) -> None:
    """The text of an example: what counts by colour on a terminal that has some, else in brackets."""
    from rich.console import Console as Terminal
    from rich.text import Text

    terminal = Terminal(soft_wrap=True, highlight=False)
    colours = terminal.is_terminal and not terminal.is_dumb_terminal and not terminal.no_color
    typer.echo()
    _say(f"{title}: {example.where}, {_some(example.tokens, 'token')}, {example.trained:,} trained on")
    text, inside = Text(), False
    for run in example.runs:
        if not colours and run.trained != inside:
            text.append(CLOSE if inside else OPEN)
        inside = run.trained
        style = "dim" if run.cut else " ".join(filter(None, ("green" if inside else "", "bold" if run.special else "")))
        text.append(visible(run.text), style if colours else "")
    if inside and not colours:
        text.append(CLOSE)
    terminal.print(text, soft_wrap=True)


def _say_bad(bad: Sequence[Finding]) -> None:
    if not bad:
        return
    typer.echo(f"\n{_some(len(bad), 'problem')}:")
    for finding in bad[:BAD_SHOWN]:
        _say(f"  {finding.line}")
    if len(bad) > BAD_SHOWN:
        typer.echo(f"  … and {len(bad) - BAD_SHOWN:,} more; lumina data check shows all")


def _summary(found: Checked, skip_bad: int) -> str:
    parts = [_some(found.documents, "good document")]
    if found.bad_records:
        tolerated = f" of {skip_bad:,} tolerated" if skip_bad else ""
        parts.append(_some(found.bad_records, "bad record") + tolerated)
    if found.bad_files:
        parts.append(_some(found.bad_files, "problem with a file", "problems with files"))
    if found.duplicates:
        parts.append(_some(found.duplicates, "exact duplicate"))
    if found.empty:
        parts.append(f"{found.empty:,} empty")
    if found.longer:
        parts.append(f"{_some(found.longer, 'conversation')} longer than a sequence")
    if found.longer_texts:
        parts.append(f"{_some(found.longer_texts, 'text')} longer than a sequence (cut without a loss)")
    return ", ".join(parts)


# -- prepare ------------------------------------------------------------------------------------------------


def _data_config(arguments: Sequence[str], held_out: Sequence[str], tokenizer: str) -> DataConfig:
    """The checked section; what preparing does not read is refused."""
    from lumina.config.resolve import resolve

    settings = [a for a in arguments if re.match(r"[a-z_.]+=", a) and not Path(a).exists()]
    specs = [a for a in arguments if a not in settings]
    wrong = [setting for setting in settings if not setting.startswith(SETTINGS)]
    if wrong:
        known = ", ".join(key + "*" * key.endswith(".") for key in SETTINGS)
        fix = f"it reads {known}; files are given as they are, other keys to train"
        raise UserError(f"{wrong[0]}: preparing does not read this key", fix)
    if not specs:
        raise UserError("there is nothing to prepare", fix="give files, folders or globs")
    if weighed := [spec for spec in specs if split_weight(spec)[1] is not None]:
        fix = "leave it out; to weigh sources, prepare each into a folder and give data.train=[DIR:WEIGHT, …] to train"
        raise UserError(f"{weighed[0]}: a weight is not for preparing", fix)
    own = [f"data.train={documents.dumps(specs, ensure_ascii=False)}"]
    if held_out:
        own.append(f"data.eval={documents.dumps(list(held_out), ensure_ascii=False)}")
    if tokenizer != "bpe":
        own.append(f"data.tokenizer={documents.dumps(tokenizer, ensure_ascii=False)}")
    return resolve("debug", [*own, *settings]).config.data


def _prepared(corpus: Corpus, out: Path, already: bool, seconds: float) -> dict[str, Any]:
    """What a folder holds, by source; seconds and speed if it was made now."""
    sources: dict[tuple[int, str], dict[str, Any]] = {}
    for side, shards in (("", corpus.train), ("heldout_", corpus.heldout)):
        for shard in shards:
            row = sources.setdefault((shard.stream.source, shard.kind), _source(shard))
            row[f"{side}documents"] = shard.stream.documents
            row[f"{side}tokens"] = shard.stream.tokens
            row["bytes"] += shard.stream.text_bytes
    facts = {key: corpus.facts[key] for key in ("documents", "bytes", "tokens", "vocab", "empty", "skipped", "split")}
    removed = {
        reason: r for reason, r in corpus.facts.get("removed", {}).items() if reason != "kept" and r["documents"]
    }
    told = {"folder": str(out), "already": already, "sources": list(sources.values()), **facts, "removed": removed}
    if not already:
        total = sum(facts["bytes"].values())
        told |= {"seconds": round(seconds, 3), "mb_per_s": round(total / 1e6 / seconds, 3)}
    return told


def _source(shard: Shard) -> dict[str, Any]:
    formats = {name: n for name, n in shard.formats.items() if (name == "text") == (shard.kind == "text")}
    counts = dict.fromkeys(("documents", "tokens", "heldout_documents", "heldout_tokens", "bytes"), 0)
    return {"name": shard.name, "kind": shard.kind, "formats": formats, **counts}


def _say_prepared(told: dict[str, Any]) -> None:
    header = ["source", "formats", "documents", "tokens", "held out", "tokens", "bytes a token"]
    rows = [
        [
            visible(source["name"]),
            ", ".join(source["formats"]),
            f"{source['documents']:,}",
            f"{source['tokens']:,}",
            f"{source['heldout_documents']:,}",
            f"{source['heldout_tokens']:,}",
            f"{source['bytes'] / max(1, source['tokens'] + source['heldout_tokens']):.2f}",
        ]
        for source in told["sources"]
    ]
    print_table(header, rows, left=2)
    typer.echo(
        f"held out {_some(told['documents']['heldout'], 'document')}, {told['tokens']['heldout']:,} tokens in all; "
        f"vocabulary {told['vocab']:,}; {told['empty']:,} empty"
    )
    for source in told["sources"]:
        if not source["documents"] and told["split"] != "given":
            _say(f"! {source['name']}: all of its {source['kind']} is held out, nothing is left to train on")
    for name in told["nothing_of"]:
        _say(f"note   nothing of {name} is left")
    for reason, removed in told["removed"].items():
        typer.echo(f"removed {_some(removed['documents'], 'document')}, {removed['bytes']:,} bytes: {reason}")
        for example in removed["examples"]:
            of = f" (of {example['of']})" if example["of"] else ""
            _say(f"  {example['where']}{of}: {' '.join(example['text'].split())[:60]}")
    for line in told["skipped"]:
        _say(f"skipped {line}")
    if not told["already"]:
        typer.echo(f"took {told['seconds']:.1f} s, {told['mb_per_s']:.3g} MB/s")


def _mode(corpus: Corpus) -> str:
    kinds = {shard.kind for shard in corpus.train}
    return " data.mode=hybrid_interleaved" if len(kinds) > 1 else " data.mode=finetune" if kinds == {"chat"} else ""
