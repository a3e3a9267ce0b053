"""Command lines flow in; calls of the library flow out. One thin module a verb, no logic.

`main()` is the entry point of `lumina`, `python -m lumina` and `Main.py`. Exit codes: `lumina.run.exit_codes`.
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command line and returns its exit code. A `UserError` is printed without a traceback."""
    from lumina.cli.app import run

    return run(arguments)
