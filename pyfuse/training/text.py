"""The text to learn from: files as they are, or the standard library's sources; a part of it is held out."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# Not in every installation, or not of the standard library itself.
_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Text(NamedTuple):
    """documents: what the files hold, in the order of their names. sha256: of all of it."""

    documents: list[str]
    sha256: str

    @property
    def characters(self) -> int:
        return sum(map(len, self.documents))


def read_text(paths: Sequence[Path] | None) -> Text:
    """The text of files, and of all files in folders; None: the sources of Python's standard library.

    Hidden files and caches of bytecode in a folder are left out. FileNotFoundError: no such path. ValueError: a file
    that is not UTF-8; no text at all.
    """
    files = standard_library() if paths is None else [f for p in paths for f in _files(Path(p))]
    digest, documents = hashlib.sha256(), []
    for file in files:
        document = utf8(file, "text")
        data = document.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
        if document:
            documents.append(document)
    if not "".join(documents).strip():
        names = "the standard library" if paths is None else ", ".join(map(str, paths))
        raise ValueError(f"text: there is none in {names}")
    return Text(documents, digest.hexdigest())


def utf8(file: Path, what: str) -> str:
    """The text of a file. ValueError: it is not UTF-8. what: begins the message."""
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{what}: {file} is not UTF-8 (byte {error.start}); convert it, or leave it out"
        ) from error


def standard_library() -> list[Path]:
    """The sources of the running Python's standard library, sorted, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        f for f in root.rglob("*.py") if not _NOT_THE_LIBRARY & set(f.relative_to(root).parts)
    )


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"text: there is no {path}")
    if not path.is_dir():
        return [path]
    found = []
    for folder, folders, names in os.walk(path):
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(f for f in found if f.is_file())


def split(documents: Sequence[str], held_out: float) -> tuple[list[str], list[str]]:
    """(to learn from, held out): the last `held_out` of the characters, which may begin within a document."""
    keep = sum(map(len, documents)) - round(sum(map(len, documents)) * held_out)
    learnt, held = [], []
    for document in documents:
        learnt.append(document[:keep])
        held.append(document[keep:])
        keep = max(0, keep - len(document))
    return [d for d in learnt if d], [d for d in held if d]
