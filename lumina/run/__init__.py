"""A request flows in; a run folder that one process owns flows out, with its paths, its lock and its history.

Nothing here imports torch: listing, finding and reading runs is instant.
"""
