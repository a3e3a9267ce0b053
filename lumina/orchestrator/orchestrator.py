"""Who watches a run: hears what each step did, and acts between two steps. Nothing is decided here yet."""

from __future__ import annotations

from typing import Any, Literal

from lumina.orchestrator.protocol import Controls, Look, Observation


class Orchestrator:
    """`observe` and `looked` hear, `between` acts; `pack` and `unpack` are its state as plain JSON values."""

    def __init__(self, mode: Literal["advise", "act"]) -> None:
        self.mode = mode

    def observe(self, observation: Observation) -> None:
        """What the step before the last did."""

    def looked(self, look: Look) -> None:
        """What the probe saw behind the last step."""

    def between(self, controls: Controls) -> None:
        """Called after each step, when all that is known of it was heard."""

    def pack(self) -> dict[str, Any]:
        return {}

    def unpack(self, state: dict[str, Any]) -> None:
        pass
