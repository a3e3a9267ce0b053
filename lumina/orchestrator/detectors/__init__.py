"""Signals -> findings: one pure function for one thing, one file a subject; `table.DETECTORS` lists them.

To add one: a function of `Signals` that returns a `Finding` or None, and a row in the table. What it costs in false
alarms is measured by `benchmarks/orchestrator/calibrate.py` on recorded healthy runs.
"""
