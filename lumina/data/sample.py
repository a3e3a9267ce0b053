"""The embedded corpus: the standard library's sources of the running Python, about 10 MB on every machine."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

from lumina.errors import UserError

# `encodings` and `pydoc_data` are near-identical tables, tests are data more than code, packages are not the
# library.
SKIPPED_FOLDERS = {
    "encodings",
    "pydoc_data",
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
# Written when Python was built: they name folders and compilers of one machine.
MACHINE_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")


def sample_files() -> list[tuple[Path, str]]:
    """Paths of the sources and their names relative to the library, sorted by name.

    Raises `UserError` if this Python has no sources on disk.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files: dict[str, Path] = {}
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith(MACHINE_PREFIXES)]
        for name in names:
            if name.endswith(".py") and not name.startswith(MACHINE_PREFIXES):
                path = Path(parent, name)
                files[path.relative_to(root).as_posix()] = path
    if not files:
        raise UserError(
            f"the sample corpus is Python's standard library, but {root} holds no sources",
            fix="give your own text with data.train=FILE",
        )
    return [(files[name], name) for name in sorted(files)]
