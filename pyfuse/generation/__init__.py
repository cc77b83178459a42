"""Text from a model: greedy, sampling and beam search, for one caller or many."""

from pyfuse.generation.engine import EngineClosed, EngineFull, GenerationEngine
from pyfuse.generation.loop import generate, stream
from pyfuse.generation.options import Options
from pyfuse.generation.runner import CacheFull, Runner
from pyfuse.generation.sampling import Logprob
from pyfuse.generation.sequence import Piece, Result

__all__ = [
    "CacheFull",
    "EngineClosed",
    "EngineFull",
    "GenerationEngine",
    "Logprob",
    "Options",
    "Piece",
    "Result",
    "Runner",
    "generate",
    "stream",
]
