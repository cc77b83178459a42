"""What flash-attn computes by Triton kernels of its own; here by pyfuse on any device."""
