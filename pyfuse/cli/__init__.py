"""The `pyfuse` command. Each sub-command is one module here with add_parser() and run().

argparse, and rich only to draw: `pyfuse doctor` has to work where nothing optional is installed.
"""

import argparse
import sys
from collections.abc import Sequence

from pyfuse.cli import demo, doctor, generate, models, run, train


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="pyfuse",
        description="Fused transformer kernels for PyTorch: see what they gain on this machine.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (demo, doctor, generate, models, run, train):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0 well, 1 failed (said on stderr), 2 wrong usage."""
    arguments = build_parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except KeyboardInterrupt:
        print("pyfuse: interrupted", file=sys.stderr)
        return 130
    return status
