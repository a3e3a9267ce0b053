"""A run's events flow in; what eyes want to see flows out. Reads events only, and never holds up a step."""
