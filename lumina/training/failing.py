"""What fails beside the steps, as an action or the orchestrator does: whether training survives it, and its words."""

from __future__ import annotations

from lumina.config.schema.config import Config
from lumina.errors import DiskRefused, MachineFailed, OutOfMemory, UserError
from lumina.training.endings import Interrupted, LeftHalfway


def ends(error: Exception, config: Config) -> bool:
    """Whether it ends the attempt, wherever it is raised."""
    if isinstance(error, DiskRefused):
        return config.checkpoint.on_error == "stop"
    return isinstance(error, Interrupted | LeftHalfway | OutOfMemory | MachineFailed)


def said(error: Exception | None) -> str:
    """The error, and where it was raised if it is none that a user can mend; None is one of another process."""
    if error is None:
        return "it failed in another process"
    if isinstance(error, UserError):
        return str(error)
    trace, where = error.__traceback__, ""
    while trace is not None:
        where, trace = f"{trace.tb_frame.f_code.co_name}, line {trace.tb_lineno}", trace.tb_next
    return f"{type(error).__name__}: {error}"[:500] + f" (in {where})"
