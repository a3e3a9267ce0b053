"""The configuration keys, one file a section. Only keys that act exist; unknown ones are errors."""
