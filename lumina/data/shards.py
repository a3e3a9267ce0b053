"""Files to shards: streams of token ids on disk with the tokenizer that made them, cached by content.

A folder of shards is built under a lock, in steps that a killed process does not have to repeat, and renamed into
place: whatever looks whole is whole, and a second process waits for the first and uses its work. Every folder is
checked against its hashes when it is opened.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lumina.config.schema.data import DataConfig
from lumina.data import split
from lumina.data.corpus import (
    Corpus,
    Shard,
    damage,
    locked,
    open_shards,
    sha256,
    verify,
    write_meta,
)
from lumina.data.files import DataFile
from lumina.data.meta import META, is_prepared, read_meta
from lumina.data.records import Problems, Record, digest
from lumina.data.request import (
    Request,
    check_kinds,
    check_length,
    contents,
    find,
    has_changed,
    identity,
    kinds_of,
    stamp,
)
from lumina.data.scan import FACTS, TABLE, Check, Scan, Source, reopen, scan
from lumina.data.streams import JOURNAL, DamagedError, Stream, training_pieces, write_streams
from lumina.data.template import DEFAULT
from lumina.data.tokenizer import BPE_CHARACTERS, Tokenizer, train_bpe
from lumina.errors import UserError
from lumina.progress import Tell, silent, whole

FORMAT = f"v2.{split.RULE}"  # of a folder of shards
BPE = "bpe"


def prepare(
    data: DataConfig,
    *,
    vocab: int,
    seq_len: int,
    tokenizer: str = "",
    cache: Path | None = None,
    progress: Tell = silent,
) -> Corpus:
    """The shards of `data.train`, with `data.eval` held out, or a part of `data.train` if there is none.

    The tokenizer is `tokenizer`, or `data.tokenizer`: "bpe", trained here on the training side with at most `vocab`
    ids, or the path of a tokenizer.json, which brings its own ids. Prepared folders are taken as they are, with their
    tokenizer. `cache` is $LUMINA_CACHE or ~/.cache/lumina. Raises `UserError` for data that cannot be read, that
    `data.mode` has no use for, or that is shorter than one sequence of `seq_len` tokens.
    """
    start = time.perf_counter()
    request = find(data)
    named = tokenizer or data.tokenizer
    corpora = [_open_prepared(*folder, progress) for folder in request.folders]
    own = _tokenizer(named, corpora)
    if request.sources:
        folder = cache or Path(os.environ.get("LUMINA_CACHE") or "~/.cache/lumina").expanduser()
        corpora.append(_cached(request, data, own, vocab, folder, progress))
    corpus = _together(corpora, request, data)
    check_kinds(data, [(s.name, s.kind, next(iter(s.formats), s.kind)) for s in corpus.train])
    check_length(corpus, seq_len)
    corpus.facts["seconds"] = round(time.perf_counter() - start, 3)
    return corpus


def prepare_folder(
    data: DataConfig, out: Path, *, vocab: int, tokenizer: str = "", progress: Tell = silent
) -> tuple[Corpus, bool]:
    """Prepares `data` into the folder `out`; also says whether that was there already, made of the same.

    Shards of other or changed data are replaced as a whole. Raises `UserError` if `out` is something else.
    """
    if out.resolve() == Path.cwd():
        raise UserError(f"{out}: the folder in which this runs", fix="name another, or a new one below it, with --out")
    out = out.resolve() if out.is_symlink() else out
    request = find(data)
    if request.folders:
        raise UserError(
            f"{request.folders[0][0]}: prepared already", fix="give the files it was made of, or train on it"
        )
    if out.exists() and not is_prepared(out) and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: there is something else", fix="give a new folder with --out")
    own = _tokenizer(tokenizer or data.tokenizer, [])
    name = _key(request, data, own, vocab, progress)
    with locked(out.parent, f".{out.name}", f"the folder {out.parent}", "give another folder with --out"):
        if is_prepared(out) and damage(out) is None and read_meta(out)["key"] == name:
            return _together([open_shards(out)], request, data), True
        building = out.parent / f".{out.name}.building"
        _build(building, request, data, own, vocab, name, progress)
        shutil.rmtree(out, ignore_errors=True)
        building.rename(out)
    return _together([open_shards(out)], request, data), False


def data_fingerprint(data: DataConfig, progress: Tell = silent) -> str:
    """Names the contents of the files of both sides, whatever their names. Raises `UserError` if one is missing."""
    request = find(data)
    prepared = [[digest(json.dumps(read_meta(folder)["files"])), weight] for _, folder, weight in request.folders]
    return digest(json.dumps([prepared, contents(request, progress)]))[:16]


def _tokenizer(name: str, corpora: Sequence[Corpus]) -> Tokenizer | None:
    """The tokenizer that is not trained here: a file's, or that of shards. Raises `UserError` if they differ."""
    own = None if name == BPE else Tokenizer.load(name)
    for corpus in corpora:
        if own is not None and own.fingerprint != corpus.tokenizer.fingerprint:
            wanted = "the other shards" if name == BPE else name
            raise UserError(
                f"{corpus.facts['sources'][0]['name']}: prepared with another tokenizer than {wanted}",
                fix="prepare it again with --tokenizer, or leave data.tokenizer out",
            )
        own = corpus.tokenizer
    return own


def _key(request: Request, data: DataConfig, own: Tokenizer | None, vocab: int, progress: Tell) -> str:
    """Names what the shards of a request hold."""
    named = [[side, weight is not None, files] for side, weight, files in contents(request, progress)]
    quality = data.quality.model_dump() if data.quality.active else None
    text = json.dumps([named, quality, data.skip_bad])
    return f"{FORMAT}-{digest(text)[:16]}-{own.fingerprint if own else f'{BPE}{vocab}'}"


# -- building -----------------------------------------------------------------------------------------------


def _cached(
    request: Request, data: DataConfig, own: Tokenizer | None, vocab: int, folder: Path, progress: Tell
) -> Corpus:
    """The shards of the cache, made if they are not there."""
    name = _key(request, data, own, vocab, progress)
    entry, built, wrong = folder / name, False, damage(folder / name)
    if wrong is not None:
        stem = name.rpartition("-")[0]
        fix = "set LUMINA_CACHE to a folder you can write, with room for it"
        with locked(folder, stem, f"the token cache {folder}", fix):
            wrong = damage(entry)  # another process may have built it meanwhile
            if wrong is not None:
                built = True
                building = folder / f"{stem}.building"
                made = _build(building, request, data, own, vocab, name, progress, to_train=True)
                # Named after the tokenizer, so that a run which brings its own BPE back finds it; "bpe" is a link.
                final = folder / f"{stem}-{made.fingerprint}"
                shutil.rmtree(final, ignore_errors=True)  # if it was damaged
                building.rename(final)
                if entry != final:
                    entry.unlink(missing_ok=True)
                    entry.symlink_to(final.name)
    corpus = open_shards(entry)
    corpus.facts["cached"] = not built
    if wrong:
        corpus.facts["rebuilt"] = wrong
    return corpus


def _build(
    building: Path,
    request: Request,
    data: DataConfig,
    own: Tokenizer | None,
    vocab: int,
    name: str,
    progress: Tell,
    to_train: bool = False,
) -> Tokenizer:
    """Writes the shards of a request into `building`, going on with what a killed process left there of the same."""
    began = building / "request"
    if not (began.is_file() and began.read_text(encoding="utf-8") == name):
        _clear(building)
        began.write_text(name, encoding="utf-8")
    hashes = request.hashes
    sources = [replace(s, files=tuple(sorted(s.files, key=lambda file: hashes[file][0]))) for s in request.sources]
    check = template_check(own)
    try:
        scanned = reopen(building)
    except (OSError, ValueError):
        _clear(building)  # of what a killed scan left
        began.write_text(name, encoding="utf-8")
        scanned = scan(sources, building, data.quality, Problems(data.skip_bad), progress, check)
    _require_text(scanned, sources)
    if to_train:
        check_kinds(data, kinds_of(scanned, sources), whole=False)
    tokenizer = own or _trained(building) or _train(sources, scanned, vocab, progress)
    tokenizer.save(building)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    try:
        streams = write_streams(sources, scanned, tokenizer, dtype, building, data.buffer, progress, check)
    except DamagedError:  # a disk that lost power: nothing there can be relied on
        shutil.rmtree(building)
        return _build(building, request, data, own, vocab, name, progress, to_train)
    if changed := [file.name for file, (_, before) in hashes.items() if stamp(file) != before]:
        raise UserError(f"{changed[0]}: changed while it was being read", "start again when nothing writes to it")
    _seal(building, sources, scanned, streams, dtype, name, hashes)
    return tokenizer


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def template_check(own: Tokenizer | None) -> Check | None:
    """A template of somebody else may refuse a conversation; ours takes all."""
    if own is None or own.chat_template == DEFAULT:
        return None

    def check(record: Record) -> None:
        if record.messages:
            own.chat.parts(record.messages)

    return check


def _require_text(scanned: Scan, sources: Sequence[Source]) -> None:
    """Raises `UserError` if a side has no document, or none that is kept."""
    for side, key in (("train", "data.train"), ("heldout", "data.eval")):
        numbers = [number for number, source in enumerate(sources) if source.side == side]
        if numbers and not any(scanned.facts["formats"][number] for number in numbers):
            raise UserError(f"{key}: no document has any text", fix="give files with text")
        if numbers and not any(scanned.sizes[number] for number in numbers):
            raise UserError(f"{key}: data.quality removes every document", fix="set its limits less strictly")


def _trained(building: Path) -> Tokenizer | None:
    """The BPE that a killed process trained."""
    try:
        return Tokenizer.load(building)
    except UserError:
        return None


def _train(sources: Sequence[Source], scanned: Scan, vocab: int, progress: Tell) -> Tokenizer:
    """BPE of the training side's texts; each source gives as much of `BPE_CHARACTERS` as it has of the corpus."""
    with whole("training the tokenizer", progress):
        return train_bpe(_training_texts(sources, scanned), vocab)


def _training_texts(sources: Sequence[Source], scanned: Scan) -> Iterator[str]:
    sizes = [size if s.side == "train" else 0 for s, size in zip(sources, scanned.sizes, strict=True)]
    room = {i: BPE_CHARACTERS * size / max(1, sum(sizes)) for i, size in enumerate(sizes)}
    for number, record in training_pieces(sources, scanned, None):
        if room[number] > 0:
            room[number] -= len(record.content)
            yield record.content
        elif all(left <= 0 for left in room.values()):
            return


def _seal(
    building: Path, sources: Sequence[Source], scanned: Scan, streams: Sequence[Stream], dtype: str, name: str,
    hashes: dict[DataFile, tuple[str, tuple[int, int]]],
) -> None:  # fmt: skip
    """Writes `meta.json`, which vouches for every other file; what only a killed process would need goes last."""
    leftovers = [building / leftover for leftover in ("request", TABLE, FACTS, JOURNAL)]
    facts: dict[str, Any] = {key: scanned.facts[key] for key in ("empty", "skipped", "removed") if key in scanned.facts}
    given = scanned.facts["train_documents"] < len(scanned.rows)
    facts["split"] = "given" if given else scanned.split.rule
    if given:
        facts["eval_in_train"] = scanned.repeated
    meta = {
        "key": name,
        "dtype": dtype,
        "facts": facts,
        "sources": [
            {"name": s.name, "formats": formats, "files": [identity(file, hashes[file][0]) for file in s.files]}
            for s, formats in zip(sources, scanned.facts["formats"], strict=True)
        ],
        "streams": [asdict(stream) for stream in streams],
        "files": {
            p.name: sha256(p) for p in sorted(building.iterdir()) if p not in leftovers and not p.name.startswith(META)
        },
    }
    write_meta(building, meta)
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)


def _open_prepared(name: str, folder: Path, weight: float | None, progress: Tell) -> Corpus:
    """A prepared folder as one source. Raises `UserError` if it is damaged; a changed source is a fact."""
    verify(name, folder, progress)
    corpus = open_shards(folder)
    changed = [f["path"] for source in corpus.facts["sources"] for f in source["files"] if has_changed(f)]
    facts = {**corpus.facts, "changed": changed, "sources": [{**s, "name": name} for s in corpus.facts["sources"]]}
    train, heldout = (
        tuple(replace(s, name=name, weight=weight) for s in side) for side in (corpus.train, corpus.heldout)
    )
    return Corpus(train, heldout, corpus.tokenizer, corpus.fingerprint, facts)


def _together(corpora: Sequence[Corpus], request: Request, data: DataConfig) -> Corpus:
    """All corpora as one, with what a reader should know of it."""
    weights = [source.weight for source in request.sources]
    names = [source.name for source in request.sources]
    sides: dict[str, list[Shard]] = {"train": [], "heldout": []}
    facts: dict[str, Any] = {"empty": 0, "skipped": [], "changed": [], "ignored_files": request.ignored}
    for corpus in corpora:
        prepared = "changed" in corpus.facts
        for side, shards in (("train", corpus.train), ("heldout", corpus.heldout)):
            if prepared and side == "heldout" and data.eval:
                continue  # what is given is held out, and nothing else
            if prepared:
                sides[side] += shards
            else:  # a cache entry may have been made of files of other names
                sides[side] += [
                    replace(s, name=names[s.stream.source], weight=weights[s.stream.source]) for s in shards
                ]
        facts["empty"] += corpus.facts["empty"]
        facts["skipped"] += corpus.facts["skipped"]
        facts["changed"] += corpus.facts.get("changed", [])
        facts["split"] = "given" if "given" in (facts.get("split"), corpus.facts["split"]) else corpus.facts["split"]
        facts |= {key: corpus.facts[key] for key in ("cached", "rebuilt") if key in corpus.facts}
        facts["eval_in_train"] = facts.get("eval_in_train", 0) + corpus.facts.get("eval_in_train", 0)
        for reason, removed in corpus.facts.get("removed", {}).items():
            before = facts.setdefault("removed", {}).get(reason, {"documents": 0, "bytes": 0, "examples": []})
            facts["removed"][reason] = {key: before[key] + removed[key] for key in before}
    total = {side: _sum(shards) for side, shards in sides.items()}
    tokenizer = corpora[0].tokenizer
    facts |= {
        "documents": {side: sums.documents for side, sums in total.items()},
        "bytes": {side: sums.text_bytes for side, sums in total.items()},
        "tokens": {side: sums.tokens for side, sums in total.items()},
        "bytes_per_token": round(total["train"].text_bytes / max(1, total["train"].tokens), 3),
        "vocab": tokenizer.vocab_size,
        "sources": [_told(shard) for shard in sides["train"]],
    }
    print_ = digest(" ".join(corpus.fingerprint for corpus in corpora))[:16]
    return Corpus(tuple(sides["train"]), tuple(sides["heldout"]), tokenizer, print_, facts)


def _sum(shards: Sequence[Shard]) -> Stream:
    total = Stream(0, "text", "")
    for shard in shards:
        total.documents += shard.stream.documents
        total.text_bytes += shard.stream.text_bytes
        total.tokens += shard.stream.tokens
    return total


def _told(shard: Shard) -> dict[str, Any]:
    stream = shard.stream
    told = {"name": shard.name, "kind": shard.kind, "documents": stream.documents, "tokens": stream.tokens}
    told["formats"] = [name for name in shard.formats if (name == "text") == (shard.kind == "text")]
    return told | ({"weight": shard.weight} if shard.weight is not None else {})
