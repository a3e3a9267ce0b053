"""Batches flow in; weights, metrics and checkpoints flow out. The trainer composes all other packages."""
