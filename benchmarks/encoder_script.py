"""Trains an nn.TransformerEncoder as somebody who has never heard of pyfuse would, and prints the fastest step.

python benchmarks/encoder_script.py [THREADS [STEPS]]
python -m pyfuse run benchmarks/encoder_script.py [THREADS [STEPS]]
"""

import sys
import time

import torch
from torch import nn

threads, steps = (int(x) for x in [*sys.argv[1:], *("2", "5")[len(sys.argv) - 1 :]])
torch.set_num_threads(threads)
torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(512, 8, dropout=0.1, batch_first=True)
model = nn.TransformerEncoder(layer, 4)
optimizer = torch.optim.AdamW(model.parameters())
x, wanted = torch.randn(16, 512, 512), torch.randn(16, 512, 512)
fastest = float("inf")
for _ in range(steps):
    start = time.perf_counter()
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x), wanted)
    loss.backward()
    optimizer.step()
    fastest = min(fastest, time.perf_counter() - start)
print(f"{1e3 * fastest:.1f} ms")
