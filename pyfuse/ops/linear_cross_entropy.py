"""The loss of a language model's last layer: cross-entropy of x·Wᵀ + b, without holding the logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyfuse.backends.chunked_loss import LossOptions
from pyfuse.guards import formula_reason, plain
from pyfuse.ops import _loss_library
from pyfuse.ops._autocast import autocast_enabled
from pyfuse.ops._checks import bind_dims, require_floating, same_device, same_dtype_device
from pyfuse.ops._loss import chosen_backend, chunked, formula
from pyfuse.ops._loss_chunks import Call

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """F.cross_entropy(F.linear(x, weight, bias), target, ...) + z_loss · mean(lse²).

    For each token, with its logits l = x·Wᵀ + b (softcap c: l ← c·tanh(l / c)), lse = log(sum exp l), target y,
    e = label_smoothing and z = z_loss:

        loss = (1 - e) (lse - l[y]) + e (lse - mean l) + z lse²
        dl = (1 + 2 z lse) exp(l - lse) - (1 - e) onehot(y) - e / V        dx = dl·W    dW = sum dlᵀ·x    db = sum dl

    The z-loss keeps lse near 0 (PaLM, arXiv:2204.02311, section 5).

    x [..., K], weight [V, K], bias [V] or None: float32, bfloat16, float16 or float64, the same for all (under
      torch.autocast they are cast as F.linear casts them). target [...]: int64, ignore_index or 0 .. V - 1.
    ignore_index: tokens with this target are left out: their loss and their rows of dx are 0, whatever x holds
      there. On "cpu" and "eager" they cost no time; "triton" multiplies them like the others, since to learn which
      they are the host would have to wait for the GPU.
    reduction: "mean" over the tokens that are not left out (NaN if there are none, as in torch; the gradients are 0
      then), "sum", or "none": [...]. In "sum" and "none" each token has its own z lse².

    The logits exist for some tokens at a time, in a fixed amount of memory (64 MiB in the wider dtype; on "triton",
    which needs no copy in that, of 2048 tokens and at most 512 MiB), as do their gradients, in the same place. For
    "mean" and "sum", dx, dW and db are computed in the forward pass, chunk by chunk, and the backward pass multiplies
    them by the gradient that arrives (Liger, arXiv:2410.10989); they are those of the sum until then, so that float16
    has no underflow. For "none", and for a second backward pass through the same graph, the backward pass computes the
    logits again (Cut Cross-Entropy, arXiv:2411.09009). In second derivatives, and under torch's program transforms and
    tensor subclasses, it is the formula with all of the logits.

    Logits in a half precision are rounded to it once, as F.linear rounds them, and dl once; everything between is
    in float32, and so are the sums over chunks of dW and db, which are rounded at the end. The result has the dtype of
    the logits; float32 under torch.autocast, as F.cross_entropy's. In float32 on a CPU the matrix products
    are those that :func:`pyfuse.ops.linear` chooses: they may differ between processes in their last bits.

    ValueError, TypeError: a size, dtype, device or option that does not fit. IndexError: a target out of range (on
    "triton", where nothing waits for the GPU, the loss of that token is NaN instead, and so is each gradient that it
    has a part in).
    NotImplementedError: a named backend that cannot do this. Those that can: "cpu", for CPU tensors; "triton", for
    float32, bfloat16 and float16 on a GPU: a kernel from the logits to their gradients (two passes over a chunk), the
    products torch's own, and no waiting for the GPU; and "eager", torch's operations alone, on any device.
    """
    _check_tensors(x, weight, target, bias)
    _check_options(label_smoothing, z_loss, reduction, softcap)
    dtype = x.dtype
    if autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        x, weight, bias = _cast(x, weight, bias)
        dtype = torch.promote_types(x.dtype, torch.float32)
    options = LossOptions(label_smoothing, z_loss, softcap)
    call = Call(options, ignore_index, reduction, dtype, backend)
    if torch.compiler.is_compiling():
        return _loss_library.run(call, x, weight, bias, target)
    call = call._replace(backend=chosen_backend(call, x, weight, bias, target))
    without_memory = x.is_meta or weight.numel() == 0
    if without_memory or formula_reason() or not plain((x, weight, bias, target)):
        return formula(call, x, weight, bias, target)
    return chunked(call, x, weight, bias, target)


def _check_tensors(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    given = {"x": (x, "... K"), "weight": (weight, "V K")}
    if bias is not None:
        given["bias"] = (bias, "V")
    bind_dims(**given)
    tensors = {name: tensor for name, (tensor, _) in given.items()}
    require_floating(**tensors)
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a torch.Tensor, got {type(target).__name__}")
    if target.dtype != torch.int64:
        raise TypeError(f"target: dtype {target.dtype}, needs int64")
    if target.shape != x.shape[:-1]:
        raise ValueError(
            f"target: expected shape {tuple(x.shape[:-1])} for x of shape {tuple(x.shape)},"
            f" got {tuple(target.shape)}"
        )
    if not (autocast_enabled() and torch.is_autocast_enabled(x.device.type)):
        same_dtype_device(**tensors)  # with autocast dtypes become one
    same_device(**tensors, target=target)


def _check_options(
    label_smoothing: float, z_loss: float, reduction: str, softcap: float | None
) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected 0 to 1, got {label_smoothing}")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"z_loss: expected a finite number of at least 0, got {z_loss}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, needs one of {', '.join(REDUCTIONS)}")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap: expected a finite number above 0 or None, got {softcap}")


def _cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As autocast casts the arguments of F.linear."""
    dtype = torch.get_autocast_dtype(x.device.type)
    x, weight = (t if t.dtype == torch.float64 else t.to(dtype) for t in (x, weight))
    if bias is not None and bias.dtype != torch.float64:
        bias = bias.to(dtype)
    given = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    same_dtype_device(**given)  # float64 is left as it is, so that it must be all of them
    return x, weight, bias
