"""Errors that a user can mend: one message that says what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """A mistake in the input. The command line prints it without a traceback and exits with code 2.

    `message` says what is wrong and where; `fix` says what to do about it. `told`: another process prints it.
    """

    told = False

    def __init__(self, message: str, fix: str = "") -> None:
        self.message = message
        self.fix = fix
        super().__init__(message, fix)

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.fix}" if self.fix else self.message

    @classmethod
    def collect(cls, problems: Sequence[str], title: str, fix: str = "") -> UserError:
        """All problems in one error, so that nobody mends them one run at a time."""
        return cls("\n".join([f"{title}:", *(f"  - {problem}" for problem in problems)]), fix)


class OutOfMemory(Exception):  # noqa: N818 - its name in the field
    """The memory does not suffice, even for one sequence at a time."""

    told = False

    def __init__(self, message: str, fix: str = "") -> None:
        self.message = message
        self.fix = fix
        super().__init__(message, fix)

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.fix}" if self.fix else self.message
