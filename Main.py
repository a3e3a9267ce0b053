"""The whole program in one file to run: `python Main.py [FILE.yaml | verb …]`. With nothing, it is the demo."""

import sys

from lumina.cli import main

if __name__ == "__main__":
    arguments = sys.argv[1:] or ["demo"]
    if arguments[0].endswith((".yaml", ".yml")):
        arguments = ["train", *arguments]
    sys.exit(main(arguments))
