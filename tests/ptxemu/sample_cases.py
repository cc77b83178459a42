"""Cases of the sample kernels, and the accuracy rule for what they return."""

from __future__ import annotations

from typing import NamedTuple

import numerics
import torch

import pyfuse


class Case(NamedTuple):
    """One attention problem. M, N: queries and keys; transposed: q, k, v are views of [B, T, H, D] memory."""

    M: int
    N: int
    causal: bool = False
    dtype: torch.dtype = torch.bfloat16
    D: int = 64
    batch: int = 1
    heads: int = 2
    transposed: bool = True

    def __str__(self) -> str:
        kind = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[self.dtype]
        return f"{kind}-B{self.batch}-H{self.heads}-M{self.M}-N{self.N}-D{self.D}{'-causal' if self.causal else ''}"

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v."""
        q, k, v = (self._tensor(n) for n in (self.M, self.N, self.N))
        return q, k, v

    def _tensor(self, length: int) -> torch.Tensor:
        x = torch.randn(self.batch, length, self.heads, self.D).to(self.dtype).transpose(1, 2)
        return x if self.transposed else x.contiguous()

    def check(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor
    ) -> None:
        """Outputs against float64, held to what eager makes of them in their own dtype."""
        exact = pyfuse.attention(
            q.double(), k.double(), v.double(), causal=self.causal, return_lse=True, backend="eager"
        )
        eager = pyfuse.attention(q, k, v, causal=self.causal, return_lse=True, backend="eager")
        numerics.check(o, exact[0], eager[0], "o")
        numerics.check(lse, exact[1], eager[1].to(lse.dtype), "lse")


ODD = (1, 3, 63, 65, 111, 197)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Every odd size as M and as N, each dtype, causal and not; N < M has rows without a key.
CASES = [
    Case(M, N, causal, dtype)
    for dtype in DTYPES
    for M, N, causal in (
        *((1, 197, False), (3, 65, True), (63, 63, True), (65, 111, False), (111, 197, True)),
        *((197, 3, True), (64, 1, False), (128, 128, True)),
    )
]
