"""Which checkpoints stay on disk, and why. No torch.

A checkpoint counts if it is there in full (`catalogue.sizes`: nothing is read) and was not found damaged when the run
last looked for one to go on from. What does not count is never deleted here: it is evidence, and `lumina checkpoints
RUN --prune` says what is wrong with it before it goes. Pinned points and damage are remembered in `<root>/notes.json`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from lumina.checkpoint import catalogue, places
from lumina.checkpoint.places import step_of
from lumina.errors import UserError

LINKS = ("latest", "best")
NOTES = "notes.json"
LEFTOVER = re.compile(r".+\.tmp-(\d+)")  # what a process was writing or deleting


def prune(
    root: Path,
    keep_last: int,
    keep_best: int = 1,
    keep_every: int = 0,
    abandoned: Collection[Path] = (),
    damaged: Collection[Path] = (),
) -> list[int]:
    """Deletes the checkpoints that nothing keeps; returns their steps, oldest first. See `kept`.

    `abandoned` are those that a later attempt went back before: they count for nothing. Something that counts always
    stays. Raises `UserError` if the notes are damaged or the disk refuses.
    """
    reasons = kept(root, keep_last, keep_best, keep_every, abandoned, damaged)
    doomed = [path for path in reversed(reasons) if not reasons[path]]
    for path in doomed:
        places.discard(path)
    return [step_of(path) for path in doomed]


def sweep(root: Path) -> None:
    """Removes what killed processes were writing, deleting or replacing; no save may be under way in this one.

    Raises `UserError` if the notes are damaged or the disk refuses.
    """
    for path in leftovers(root):
        with places.disk(f"{path}: not deleted"):
            places.remove(path)
    for path in counting(root):
        places.settle(path)


def leftovers(root: Path) -> list[Path]:
    """What dead processes were writing or deleting. It is this one's, too, whose id an earlier one may have had."""
    found = ((path, LEFTOVER.fullmatch(path.name)) for path in root.iterdir())
    return [path for path, match in found if match and not _another_lives(int(match[1]))]


def kept(
    root: Path,
    keep_last: int,
    keep_best: int = 1,
    keep_every: int = 0,
    abandoned: Collection[Path] = (),
    damaged: Collection[Path] = (),
) -> dict[Path, list[str]]:
    """What keeps each checkpoint that counts, newest first: `newest`, `best`, `every 500`, `latest`, `pinned: why`.

    The newest `keep_last`, the `keep_best` of the lowest held-out losses among those that were evaluated, every one of
    a step that `keep_every` divides (0: none), what the links point at, and what is pinned. What is known to be
    `damaged` does not count.
    """
    whole = [path for path in counting(root) if path not in damaged]
    own = [path for path in whole if path not in abandoned] or whole[:1]
    losses = {path: loss for path in own if (loss := catalogue.heldout_loss(path)) is not None}
    links = {name: os.readlink(root / name) for name in LINKS if (root / name).is_symlink()}
    pinned = pins(root)
    reasons: dict[Path, list[str]] = {path: [] for path in whole}

    def keep(paths: Iterable[Path], why: str) -> None:
        for path in paths:
            reasons[path].append(why)

    keep(own[: max(1, keep_last)], "newest")
    keep(sorted(losses, key=losses.__getitem__)[:keep_best], "best")
    keep((path for path in own if keep_every and step_of(path) % keep_every == 0), f"every {keep_every}")
    for path in whole:
        reasons[path] += [f"link {name}" for name, target in links.items() if target == path.name]
        reasons[path] += [f"pinned: {pinned[step]}"] if (step := step_of(path)) in pinned else []
    return reasons


def delete(root: Path, paths: Iterable[Path], abandoned: Collection[Path] = ()) -> None:
    """Deletes these checkpoints, damaged or not; a link to one of them is pointed at the newest left, or goes (`best`).

    Raises `UserError`, and deletes nothing, if no other checkpoint would be left; `DiskRefused` if the disk refuses.
    """
    doomed = set(paths)
    left = [path for path in counting(root) if path not in doomed and path not in abandoned]
    if doomed and not left:
        fix = "keep more, or delete the folder of the run yourself"
        raise UserError(f"{root}: nothing would be left to go on from", fix)
    for path in doomed:
        places.discard(path)
    for link in (root / name for name in LINKS):
        if link.is_symlink() and not link.exists():
            places.remove(link)
            if link.name == "latest" and (plain := [path for path in left if path.suffix != places.OLD]):
                places.point(root, "latest", step_of(plain[0]))


def counting(root: Path) -> list[Path]:
    """The checkpoints that are there in full and not known as damaged, newest first."""
    damaged = _notes(root)["damaged"]
    whole = [path for path in places.checkpoints(root) if catalogue.sizes(path) is not None]
    return [path for path in whole if path.name not in damaged or damaged[path.name] != catalogue.seal(path)]


def pin(root: Path, wanted: Mapping[int, str]) -> None:
    """Keeps the checkpoints of these steps, each with its reason; those pinned before are left to the rules again.

    Raises `DiskRefused` if the disk refuses.
    """
    if wanted != pins(root):
        _write(root, _notes(root) | {"pinned": {str(step): why for step, why in sorted(wanted.items())}})


def pins(root: Path) -> dict[int, str]:
    """The pinned steps, each with its reason."""
    return {int(step): why for step, why in _notes(root)["pinned"].items()}


def note_damaged(root: Path, paths: Iterable[Path]) -> None:
    """Remembers that these do not verify: they stay, but count no longer, until their step is saved again.

    Raises `DiskRefused` if the disk refuses.
    """
    notes = _notes(root)
    known = notes["damaged"]
    more = {path.name: catalogue.seal(path) for path in paths if catalogue.sizes(path) is not None}
    if known | more != known:  # what is not there in full does not count anyway
        _write(root, notes | {"damaged": known | more})


def check_links(root: Path) -> None:
    """Raises `UserError` where a link has become a folder: copies that follow links (scp -r, zip) make one."""
    for path in (root / name for name in LINKS):
        if path.is_dir() and not path.is_symlink():
            fix = f"delete it: it repeats one of the step-… folders beside it (rm -r {shlex.quote(str(path))})"
            raise UserError(f"{path}: a folder, which has to be a link", fix)


def _notes(root: Path) -> dict[str, dict[str, str]]:
    """`pinned`, by step, and `damaged`, by folder: the fingerprint that the damaged one has."""
    path = root / NOTES
    try:
        notes = catalogue.read_json(path) if os.path.lexists(path) else {}
        found = {kind: {str(k): str(v) for k, v in notes.get(kind, {}).items()} for kind in ("pinned", "damaged")}
        for step in found["pinned"]:
            int(step)
    except (ValueError, AttributeError, RecursionError) as error:
        fix = "restore the file, or delete it: then nothing is pinned any more"
        raise UserError(f"{path}: not the notes of a run's checkpoints: {error}", fix) from None
    return found


def _write(root: Path, notes: dict[str, dict[str, str]]) -> None:
    """Replaces the notes as a whole."""
    aside = places.temporary(root / NOTES)
    with places.disk(f"{root / NOTES}: not written"):
        aside.write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")
        places.sync(aside)
        aside.replace(root / NOTES)
        places.sync(root)


def _another_lives(pid: int) -> bool:
    """Whether a process other than this one has this id. In containers an earlier one often had our own."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to somebody else
        return True
    return True
