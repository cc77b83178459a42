"""LayerNorm and RMSNorm over the last dimension, with the residual add that stands before them."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from pyfuse import dispatch
from pyfuse.ops._autocast import autocast_enabled, for_residual
from pyfuse.ops._random import draw_seed

CASTINGS = ("llama", "gemma", "torch")


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    prenorm: Literal[False] = False,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    prenorm: Literal[True],
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    prenorm: bool = False,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """z = dropout(x) + residual; y = (z - mean(z)) / sqrt(var(z) + eps) · weight + bias.

    Ba et al., arXiv:1607.06450. Mean and (biased) variance run over the last dimension.

    x [..., D], any leading shape: float32, bfloat16, float16 or float64.
    weight, bias [D] or None (1 and 0), of any floating-point dtype, so that parameters kept in
      float32 serve x in bfloat16.
    residual: of x's shape, and of x's dtype or a wider one; z has its dtype (x's where there is
      none). So a residual stream in float32 stays in float32. Under torch.autocast a narrower one
      is widened.
    prenorm: return (y, z) rather than y: z is the next block's residual.
    dropout_p: the share of x's elements set to 0 (the others are divided by 1 - dropout_p), with
      a seed from torch's default generator. Pass 0 outside training.

    y has x's shape and dtype. The sum is taken in float32 (float64 for float64) and rounded to z's
    dtype; the statistics are those of this z, in float32 or wider; y is rounded once. Where there
    is neither residual nor dropout, z is x itself, not a copy.
    ValueError, TypeError: a size, dtype or device that does not fit; NotImplementedError: a named
    backend that cannot do this.
    """
    if autocast_enabled() and residual is not None:
        residual = for_residual(x, residual)
    _check_norm(x, residual, eps, dropout_p)
    if weight is not None:
        _check_parameter("weight", weight, x)
    if bias is not None:
        _check_parameter("bias", bias, x)
    alias = residual is None and dropout_p == 0.0  # z is x
    options = _options(eps, residual, prenorm and not alias, dropout_p)
    y = dispatch.run("layer_norm", (x, weight, bias), options, backend)
    return (y, x) if prenorm and alias else y


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    prenorm: Literal[False] = False,
    dropout_p: float = 0.0,
    casting: str = "llama",
    backend: str | None = None,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    prenorm: Literal[True],
    dropout_p: float = 0.0,
    casting: str = "llama",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    prenorm: bool = False,
    dropout_p: float = 0.0,
    casting: str = "llama",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """z = dropout(x) + residual; n = z / sqrt(mean(z²) + eps); y = n · weight.

    Zhang and Sennrich, arXiv:1910.07467. The mean runs over the last dimension. x, weight,
    residual, prenorm, dropout_p, z and the errors are as in `layer_norm`; n is float32 (float64 for
    float64). casting says where n is rounded, which differs between models:

      "llama": y = weight · n.to(x.dtype), in the dtype to which torch promotes weight and x:
        float32 for a float32 weight and a bfloat16 x. Hugging Face's LlamaRMSNorm, T5LayerNorm and
        most others.
      "gemma": y = ((1 + weight) · n).to(x.dtype). GemmaRMSNorm.
      "torch": y = (weight · n).to(x.dtype). torch.nn.RMSNorm.
    """
    if autocast_enabled() and residual is not None:
        residual = for_residual(x, residual)
    _check_norm(x, residual, eps, dropout_p)
    if weight is not None:
        _check_parameter("weight", weight, x)
    if casting not in CASTINGS:
        raise ValueError(f"casting: got {casting!r}, needs one of {', '.join(CASTINGS)}")
    alias = residual is None and dropout_p == 0.0  # z is x
    options = _options(eps, residual, prenorm and not alias, dropout_p)
    options["casting"] = casting
    y = dispatch.run("rms_norm", (x, weight), options, backend)
    return (y, x) if prenorm and alias else y


def _options(
    eps: float, residual: Tensor | None, prenorm: bool, dropout_p: float
) -> dict[str, Any]:
    return {
        "eps": eps,
        "residual": residual,
        "prenorm": prenorm,
        "dropout_p": dropout_p,
        "dropout_seed": draw_seed() if dropout_p > 0.0 else None,
    }


def _check_norm(x: Tensor, residual: Tensor | None, eps: float, dropout_p: float) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., D] with D > 0, got shape {tuple(x.shape)}")
    if not eps >= 0.0:
        raise ValueError(f"eps: expected at least 0, got {eps}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected 0 <= dropout_p < 1, got {dropout_p}")
    if residual is None:
        return
    if residual.shape != x.shape:
        raise ValueError(
            f"residual: expected x's shape {tuple(x.shape)}, got {tuple(residual.shape)}"
        )
    if residual.dtype != x.dtype and torch.promote_types(residual.dtype, x.dtype) != residual.dtype:
        raise TypeError(f"residual: got {residual.dtype}, needs x's dtype {x.dtype} or a wider one")
    if residual.device != x.device:
        raise ValueError(f"residual: is on {residual.device}, but x is on {x.device}")


def _check_parameter(name: str, parameter: Tensor, x: Tensor) -> None:
    if parameter.ndim != 1 or parameter.shape[0] != x.shape[-1]:
        raise ValueError(
            f"{name}: expected shape ({x.shape[-1]},) for x of shape {tuple(x.shape)},"
            f" got {tuple(parameter.shape)}"
        )
    if not parameter.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {parameter.dtype}")
    if parameter.device != x.device:
        raise ValueError(f"{name}: is on {parameter.device}, but x is on {x.device}")
