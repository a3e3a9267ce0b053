"""How an attempt ends before its last step, beside errors: raised through whatever is under way."""

from __future__ import annotations

from lumina.run.folder import Run


class Interrupted(Exception):  # noqa: N818 - not an error: an arm was left because the run is asked to stop
    """A trial was left because the run is asked to stop; the run stands where it left on trial."""


class LeftHalfway(RuntimeError):  # noqa: N818 - the state of the run, as a person reads it
    """A way back failed when the state was no longer whole: the attempt ends, and the next goes on from the disk."""


class Stopped(Exception):  # noqa: N818 - not an error: the run was asked to stop and saved itself
    """The run was stopped after saving its state at `step`: by a signal, or by the orchestrator: then its rule."""

    def __init__(self, run: Run, step: int, signal: str) -> None:
        super().__init__(f"stopped by {signal} at step {step}; state saved")
        self.run, self.step, self.signal = run, step, signal

    @property
    def handed_over(self) -> bool:
        """Whether a person has to look before it goes on."""
        return not self.signal.startswith("SIG")
