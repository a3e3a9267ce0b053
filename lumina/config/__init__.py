"""A preset, a YAML file and key=value overrides flow in; one checked `Config` with the origin of every value flows out."""
