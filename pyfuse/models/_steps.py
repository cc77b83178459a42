"""The two steps of a fetch that other programs carry out: pip's download and the conversion."""

import hashlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_WITHOUT_NETWORK = " (Without a network: pyfuse models fetch --wheels DIR, with the wheel in DIR.)"
Report = Callable[[str, int, int], None]  # stage, done, total


class FetchError(RuntimeError):
    """A model could not be fetched; the message says why and what to do."""


def silent(stage: str, done: int, total: int) -> None:
    """A report that says nothing."""


def disk_full(folder: Path) -> FetchError:
    """The error for a disk that filled up in the middle of the work."""
    return FetchError(
        f"cache: the disk of {folder} is full; free some space and run the command again, "
        "or choose another folder with --cache DIR or PYFUSE_CACHE"
    )


def download(
    wheel: str,
    sha256: str,
    size: int,
    kept: Path,
    scratch: Path,
    wheels: Path | None,
    report: Report,
    *,
    source: bool = False,
) -> Path:
    """Have pip put the wheel (project==version) of that hash in `kept`; reuse one that is there.

    scratch: a folder for pip's temporary files, where the growing download can be watched.
    source: not the project's wheel, but its source distribution.
    """
    if done := _kept_wheel(kept, sha256):
        report("download", size, size)
        return done
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"pip is missing in {sys.executable}; add it with: {sys.executable} -m ensurepip "
            "(in an environment made by uv: uv pip install pip)"
        )
    scratch.mkdir()
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{wheel} --hash=sha256:{sha256}\n", "utf-8")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--require-hashes"]
    command += ["--no-binary", wheel.partition("==")[0]] if source else ["--only-binary", ":all:"]
    command += ["--requirement", str(requirements), "--dest", str(kept)]
    if wheels is not None:
        if not wheels.is_dir():
            raise FetchError(f"wheels: no folder {wheels}")
        command += ["--no-index", "--find-links", str(wheels.absolute())]

    log = scratch / "pip.log"
    environment = {**os.environ, "TMPDIR": str(scratch)}  # pip streams into its temporary folder
    with log.open("wb") as sink:
        pip = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment)
        with _ended_on_error(pip):
            while _still_runs(pip, 0.1):
                got = _downloaded(scratch, ".tar.gz" if source else ".whl")
                report("download", min(got, size), size)
    if pip.returncode != 0:
        hint = "" if source else _WITHOUT_NETWORK
        raise _pip_error(wheel, sha256, kept, log.read_text("utf-8", "replace"), hint)
    if done := _kept_wheel(kept, sha256):
        report("download", size, size)
        return done
    raise FetchError(f"pip says that it downloaded {wheel}, but {kept} has no file of its hash")


def _kept_wheel(kept: Path, sha256: str) -> Path | None:
    """The wheel of that hash in `kept`; other files there are removed."""
    found = None
    for file in kept.iterdir():
        if _sha256(file) == sha256:
            found = file
        else:
            file.unlink()
    return found


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _downloaded(scratch: Path, suffix: str) -> int:
    """Bytes of the files that end like this, among folders that pip makes and removes meanwhile."""
    files = (Path(folder, name) for folder, _, names in os.walk(scratch) for name in names)
    return sum(_size(file) for file in files if file.name.endswith(suffix))


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # pip moved it between the listing and the look
        return 0


def _pip_error(wheel: str, sha256: str, kept: Path, log: str, hint: str) -> FetchError:
    if "DO NOT MATCH THE HASHES" in log:
        got = re.search(r"Got\s+([0-9a-f]{64})", log)
        return FetchError(
            f"{wheel}: the file offered has sha256 {got[1] if got else 'unknown'}, expected "
            f"{sha256}; it was changed on its way or in a mirror, and was not used"
        )
    if "No space left on device" in log:
        return disk_full(kept)
    reasons = [line for line in log.splitlines() if line.startswith(("ERROR", "WARNING: Retry"))]
    tail = "\n  ".join((reasons or log.splitlines())[-4:])
    return FetchError(
        f"pip could not download {wheel}. Is there a network, and does pip's index have it?"
        f"{hint}\n  {tail}"
    )


def converter(folder: Path, gguf: str, out: Path) -> list[str]:
    """The command that converts folder/gguf into the folder `out`."""
    return [sys.executable, "-m", "pyfuse.models.convert", str(folder), gguf, str(out)]


def convert(folder: Path, gguf: str, out: Path, report: Report) -> None:
    """Convert in a process of its own; `report` gets percentages."""
    report("convert", 0, 100)
    child = subprocess.Popen(
        converter(folder, gguf, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert child.stderr is not None
    said = b""
    with child.stderr, _ended_on_error(child):
        while chunk := os.read(child.stderr.fileno(), 4096):
            said = (said + chunk)[-8192:]
            if percent := re.findall(rb"(\d+)%\|", chunk):
                report("convert", min(int(percent[-1]), 99), 100)  # 100 is said when it is saved
        child.wait()
    if child.returncode != 0:
        raise _conversion_error(folder / gguf, child.returncode, said.decode("utf-8", "replace"))
    report("convert", 100, 100)


def _conversion_error(file: Path, status: int, said: str) -> FetchError:
    again = "run the same command again: the download is kept"
    if status < 0:
        name = signal.Signals(-status).name
        memory = " (out of memory? it takes about 1.5 GB)" if name == "SIGKILL" else ""
        return FetchError(f"the conversion of {file.name} was ended by {name}{memory}; {again}")
    if "No space left on device" in said:
        return disk_full(file.parent)
    lines = [line for line in re.split(r"[\r\n]+", said) if line.strip()]
    tail = "\n  ".join(lines[-4:])
    return FetchError(f"the conversion of {file.name} failed; {again}\n  {tail}")


@contextmanager
def _ended_on_error(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Leave no process behind when the work in this block is interrupted."""
    try:
        yield
    except BaseException:
        process.terminate()
        process.wait()
        raise


def _still_runs(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """Wait that long for the process; whether it still runs."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False
