"""Head sizes, angles and tables of the rotary embedding's tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HEADS = [(2, 2), (3, 2), (15, 14), (63, 62), (64, 64), (65, 32), (80, 20), (128, 0), (197, 196)]
LONG = (601, 600)  # more pairs than the kernel holds angles of
ROTATIONS = ["half", "interleaved"]


def angles(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    theta = 6.3 * torch.rand(shape, dtype=torch.float64)
    return theta.cos().to(dtype), theta.sin().to(dtype)


TABLES: dict[str, Callable[[], tuple[Tensor, Tensor, Tensor | None]]] = {
    "shared": lambda: (*angles(5, 6), None),
    "batched": lambda: (*angles(2, 5, 6), None),
    "expanded": lambda: (*(t.expand(2, 5, 6) for t in angles(1, 5, 6)), None),
    "first_half": lambda: (*(t[..., :6] for t in angles(2, 5, 12)), None),
    "columns": lambda: (*(t.transpose(1, 2) for t in angles(2, 6, 5)), None),
    "unlike": lambda: (angles(5, 6)[0], angles(6, 5)[1].T, None),
    "gathered": lambda: (*angles(40, 6), torch.tensor([3, 39, 0, 3, 7])),
    "gathered_each": lambda: (*angles(40, 6), torch.randint(0, 40, (2, 5))),
    "gathered_int32": lambda: (*angles(40, 6), torch.randint(0, 40, (2, 5), dtype=torch.int32)),
    "gathered_strided": lambda: (*angles(40, 6), torch.randint(0, 40, (5, 4)).T[::2]),
    "gathered_expanded": lambda: (*angles(40, 6), torch.arange(5).expand(2, 5)),
}
