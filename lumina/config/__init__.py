"""A preset, a YAML file and key=value settings flow in; a checked `Config` with every origin flows out."""
