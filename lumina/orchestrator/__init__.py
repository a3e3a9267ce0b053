"""Evidence -> decisions. What the run did comes in as observations; what should be done goes out through `Controls`.

Nothing here knows of training: decisions can be made on recorded curves.
"""
