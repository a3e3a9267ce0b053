"""The shape of a model flows in; what its training holds in memory, moment by moment, flows out. No torch."""
