"""Ours to the world and back. In: a run. Out: files that other tools load, or another run."""
