"""Text from a model: greedy, sampling and beam search."""

from pyfuse.generation.loop import generate, stream
from pyfuse.generation.options import Options
from pyfuse.generation.sampling import Logprob
from pyfuse.generation.sequence import Piece, Result

__all__ = ["Logprob", "Options", "Piece", "Result", "generate", "stream"]
