"""`pyfuse run`: a script as it is, with torch's attention, norms, linear layers and dropout on pyfuse."""

import argparse
import runpy
import sys
from pathlib import Path


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `run`."""
    parser = commands.add_parser(
        "run",
        help="run an unchanged script with torch's attention, norms, linear layers and dropout on pyfuse",
        description="Run a Python script as `python SCRIPT ...` would, within pyfuse.override_torch(). "
        "At the end, how many calls pyfuse ran and how many were left to torch, with the reasons, goes to stderr.",
        usage="pyfuse run [-h] (SCRIPT | -m MODULE) [ARGUMENT ...]",
    )
    parser.add_argument("-m", action="store_true", dest="module", help="SCRIPT is a module's name")
    parser.add_argument("script", metavar="SCRIPT", help="a file, or with -m a module")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="ARGUMENT", help="its own arguments"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the script; what it raises, and its exit status, go on."""
    script = arguments.script
    if not arguments.module and not Path(script).is_file():
        print(f"pyfuse run: {script}: no such file", file=sys.stderr)
        return 2
    from pyfuse.nn.override import override_torch

    before = sys.argv, sys.path[:]
    sys.argv = [script, *arguments.arguments]
    sys.path.insert(0, str(Path.cwd() if arguments.module else Path(script).resolve().parent))
    override = override_torch()
    try:
        with override:
            if arguments.module:
                runpy.run_module(script, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(script, run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before
        print(f"pyfuse run: {override.calls}", file=sys.stderr)
    return 0
