"""What `data.train` names: files, globs, folders, the embedded corpus, data sets of the Hugging Face hub.

    specs -> `find_files` -> files -> `lumina.data.formats`

A folder is searched with its subfolders, but not through links to folders and not in hidden ones. What a file holds is
told by its suffix; a file that is given by its own name and has another suffix is text.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lumina.data.records import Problems
from lumina.data.sample import sample_files

Container = Literal["text", "json", "jsonl", "parquet", "hub", "sample", "sample_chat", "ignored"]
Compression = Literal["", "gz", "zst"]

TEXT_SUFFIXES = (
    ".txt", ".md", ".rst", ".py", ".pyi", ".js", ".ts", ".jsx", ".tsx", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu",
    ".java", ".go", ".rs", ".rb", ".sh", ".sql", ".html", ".css", ".tex", ".toml", ".yaml", ".yml", ".xml", ".r",
    ".jl", ".swift", ".kt", ".scala", ".lua", ".php", ".pl", ".hs", ".ml",
)  # fmt: skip
CONTAINERS: dict[str, Container] = {
    **dict.fromkeys(TEXT_SUFFIXES, "text"),
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst"}
KNOWN = ".txt, .md, .jsonl, .json, .parquet, program sources, also as .gz or .zst"
NO_FILE = "neither a file nor a folder; a broken link, a pipe or a device gives no text"
HUB = "hub:"
_HUB = re.compile(r"hub:([^@#]+)((?:[@#][^@#]+)*)")


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file that a spec gives. `ignored` files lie in a folder but do not look like text.

    A data set of the hub is a "file" too, whose `path` says what it is and where nothing lies.
    """

    path: Path
    name: str
    container: Container
    compression: Compression = ""

    @property
    def identity(self) -> str:
        """Equal for two files that give the same documents. The embedded corpus may be text and conversations."""
        if self.container == "hub":
            return str(self.path)
        real = os.path.realpath(self.path)
        return f"sample_chat:{real}" if self.container == "sample_chat" else real


def find_files(specs: Sequence[str], problems: Problems, seen: dict[str, str] | None = None) -> list[DataFile]:
    """The files of all `specs`. `seen` says which spec gave a file: no two may give the same one."""
    seen = {} if seen is None else seen
    files: list[DataFile] = []
    for spec in specs:
        try:
            found = {file.identity: file for file in _expand(spec, problems)}
        except OSError as error:
            problems.file(f"{spec}: {error.filename}: {error.strerror}")
            continue
        repeated = next((identity for identity in found if identity in seen), None)
        if repeated:
            name = found[repeated].name
            problems.file(f"{spec}: {name} is already given by {seen[repeated]!r}; give every file once")
            continue
        seen.update(dict.fromkeys(found, spec))
        files += found.values()
    return files


def parse_hub(spec: str) -> tuple[str, str, str | None]:
    """`("owner/name", "train", None)` of `hub:owner/name`: name, split and configuration of `hub:NAME@SPLIT#CONFIG`.

    Raises `ValueError` with what is wrong.
    """
    match = _HUB.fullmatch(spec)
    options = re.findall(r"([@#])([^@#]+)", match[2]) if match else []
    if match is None or len(dict(options)) < len(options):
        raise ValueError("a data set of the hub is given as hub:OWNER/NAME, hub:OWNER/NAME@SPLIT or …@SPLIT#CONFIG")
    return match[1], dict(options).get("@", "train"), dict(options).get("#")


def _expand(spec: str, problems: Problems) -> list[DataFile]:
    if spec == "sample":
        return [DataFile(path, name, "sample") for path, name in sample_files()]
    if spec == "sample_chat":
        return [DataFile(path, name, "sample_chat") for path, name in sample_files()]
    if spec.startswith(HUB):
        return _hub(spec, problems)
    if not spec:  # Path would take it for the current folder
        problems.file("'': an empty name gives no file")
        return []
    path = Path(os.path.expanduser(spec))  # leaves alone what names nobody, where Path would raise
    if path.is_file():
        if path.stat().st_size == 0:
            problems.file(f"{spec}: the file is empty")
        return _data_file(path, problems)
    if path.is_dir():
        return _folder(path, problems)
    matches = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(spec) else []
    if not matches:
        problems.file(_missing(spec, path))
    files: list[DataFile] = []
    for match in map(Path, matches):
        files += _folder(match, problems) if match.is_dir() else _data_file(match, problems)
    return files


def _hub(spec: str, problems: Problems) -> list[DataFile]:
    try:
        name, split, config = parse_hub(spec)
    except ValueError as error:
        problems.file(f"{spec}: {error}")
        return []
    return [DataFile(Path(f"{HUB}{name}@{split}#{config or ''}"), spec, "hub")]


def kind_of(path: Path) -> tuple[Container | None, Compression]:
    """What the suffixes of `path` say: `("jsonl", "gz")` of `a.jsonl.gz`; no container if they say nothing."""
    compression = COMPRESSIONS.get(path.suffix.lower(), "")
    inner = path.with_suffix("") if compression else path
    return CONTAINERS.get(inner.suffix.lower()), compression


def _data_file(path: Path, problems: Problems) -> list[DataFile]:
    if not path.is_file():
        problems.file(f"{path}: {NO_FILE}")
        return []
    container, compression = kind_of(path)
    if container == "parquet" and compression:
        problems.file(f"{path}: parquet inside .{compression} cannot be read in parts; unpack it")
        return []
    return [DataFile(path, path.as_posix(), container or "text", compression)]


def _folder(folder: Path, problems: Problems) -> list[DataFile]:
    files: list[DataFile] = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        seen = sorted(name for name in folders if not name.startswith("."))
        ours = [Path(parent, name) for name in seen if _is_ours(Path(parent, name))]
        folders[:] = [name for name in seen if Path(parent, name) not in ours]
        files += [DataFile(path, path.as_posix(), "ignored") for path in ours]
        for path in (Path(parent, name) for name in sorted(names) if not name.startswith(".")):
            if kind_of(path)[0]:
                files += _data_file(path, problems)
            else:
                files.append(DataFile(path, path.as_posix(), "ignored"))
    if all(file.container == "ignored" for file in files):
        others = f", only others such as {files[0].name}" if files else ""
        problems.file(f"{folder}: the folder has no files that can be read ({KNOWN}){others}")
    return files


def _is_ours(folder: Path) -> bool:
    """A run, or shards: what we made is no data, unless it is named."""
    return (folder / "meta.json").is_file() and any((folder / n).is_file() for n in ("tokenizer.json", "config.yaml"))


def _raise(error: OSError) -> None:
    raise error


def _missing(spec: str, path: Path) -> str:
    if glob.has_magic(spec):
        return f"{spec}: no file matches (in {Path.cwd()})"
    if os.path.lexists(path):
        return f"{spec}: {NO_FILE}"
    siblings = os.listdir(path.parent) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f"; did you mean {(path.parent / close[0]).as_posix()}?" if close else f" (in {Path.cwd()})"
    return f"{spec}: no such file or folder{hint}"
