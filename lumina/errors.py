"""Errors that a user can mend: one message that says what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class Told(Exception):  # noqa: N818 - it says something
    """The command line prints it without a traceback.

    `message` says what is wrong and where; `fix` says what to do about it. `told`: another process prints it.
    """

    told = False

    def __init__(self, message: str, fix: str = "") -> None:
        self.message = message
        self.fix = fix
        super().__init__(message, fix)

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.fix}" if self.fix else self.message


class UserError(Told):
    """A mistake in the input. The command line exits with code 2."""

    @classmethod
    def collect(cls, problems: Sequence[str], title: str, fix: str = "") -> UserError:
        """All problems in one error, so that nobody mends them one run at a time."""
        return cls("\n".join([f"{title}:", *(f"  - {problem}" for problem in problems)]), fix)


class DiskRefused(UserError):  # noqa: N818 - what happened, as the user reads it
    """The disk did not take something: it is full, read-only, or gone. Another try may succeed."""


class OutOfMemory(Told):
    """The memory does not suffice, even for one sequence at a time. The command line exits with code 5."""


class MachineFailed(Told):
    """Something that training needs failed, as a disk or a network does; it may pass. The command line exits with 6."""
