"""Faults and traps in, verdicts on whoever watches out.

    faults (what is done to a run) -> cases (on which runs) -> arms (forked from healthy ones), running (all of them)
        -> raw (a line each; also of other trainers) -> scoring -> page

`policies` are other watchers than the orchestrator.
"""
