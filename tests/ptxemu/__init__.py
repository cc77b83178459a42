"""An emulator of compiled PTX: it runs GPU kernels on a machine without a GPU, and checks what they do.

    module = ptxemu.load(ptx)                                        # refuses what it does not know, with its line
    report = module.launch("kernel", grid=4, block=128, args=[x, y, n], shared=1024)
    report.check()                                                   # raises on races, out-of-bounds accesses, …

Time is not modelled: nothing here says how fast a kernel is.
"""

from .arguments import Argument, Output, Packed
from .arguments import Struct as struct
from .build import BuildError
from .emulator import Module, PtxError, load
from .report import Accesses, EmulationError, Finding, Report
from .tensor_map import TensorMap

__all__ = [
    "Accesses",
    "Argument",
    "BuildError",
    "EmulationError",
    "Finding",
    "Module",
    "Output",
    "Packed",
    "PtxError",
    "Report",
    "TensorMap",
    "load",
    "struct",
]
