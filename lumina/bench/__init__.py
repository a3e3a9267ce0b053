"""Measurements of speed and memory on the machine at hand: compared fairly, beside the machine's own limits."""
