"""`python -m lumina`."""

import sys

from lumina.cli import main

if __name__ == "__main__":
    sys.exit(main())
