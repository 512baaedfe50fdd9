# Copyright (c) 2026 SegResMamba bundle contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .engines import resolve_engine
from .orders import index_for

__all__ = ["oriented_mixer"]


def oriented_mixer(
    tokens: torch.Tensor,
    in_proj_weight: torch.Tensor | None,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_proj_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    orders: Sequence[str],
    spatial_shape: Sequence[int],
    engine: str = "auto",
) -> torch.Tensor:
    """
    What a Mamba-1 mixer does before ``out_proj``, along K scan orders of one volume, summed and gated once (SegResMamba
    section 2.1, ``ToM = Mamba(z_f) + Mamba(z_r) + Mamba(z_s)``): ``in_proj`` to (x, z), which the orders share; for
    each order causal depthwise convolution of x along it, SiLU, ``x_proj`` to (dt, B, C), selective scan with
    ``softplus(dt_proj(dt))``, ``+ D u``.

    Args:
        tokens: in raster order (batch, L, c).
        in_proj_weight: (2 d, c), of the input x, then of the gate z; None where ``tokens`` are these (batch, L, 2 d).
        conv_weight: (K, d, taps).
        conv_bias: (K, d).
        x_proj_weight: (K, dt_rank + 2 n, d).
        dt_proj_weight: (K, d, dt_rank).
        dt_proj_bias: (K, d).
        A: (K, d, n).
        D: (K, d).
        orders: K scan orders, see :py:func:`order_index`.
        spatial_shape: the volume's (D, H, W), ``D * H * W = L``.
        engine: as in :py:func:`selective_scan`. An engine may bring its own fused form of all this.

    Returns:
        (batch, L, d), ``SiLU(z) * sum over orders``.

    Raises:
        ValueError: when shapes do not fit or an order or engine is unknown.
        RuntimeError: when the engine is not available here.
    """
    c, d = tokens.shape[-1], conv_weight.shape[1]
    projected = (c, c) if in_proj_weight is None else tuple(in_proj_weight.shape)
    if projected != (2 * d, c) or conv_weight.shape[0] != len(orders):
        raise ValueError(
            f"tokens must be (batch, L, c), in_proj_weight (2 d, c), or None where c = 2 d, and the parameters (K = "
            f"{len(orders)} orders, d, ...), got {tuple(tokens.shape)}, "
            f"{None if in_proj_weight is None else projected} and {tuple(conv_weight.shape)}."
        )
    if 0 in (*tokens.shape, *conv_weight.shape, dt_proj_weight.shape[2], A.shape[2]):
        raise ValueError(
            f"nothing to scan: tokens {tuple(tokens.shape)}, d {d}, taps {conv_weight.shape[2]}, "
            f"dt_rank {dt_proj_weight.shape[2]}, n {A.shape[2]}; none may be empty, nor 0."
        )
    indices = [index_for(order, spatial_shape, tokens.shape[1], tokens.device) for order in orders]
    module = resolve_engine(engine, tokens.device, torch.promote_types(tokens.dtype, A.dtype))
    if hasattr(module, "mixer") and conv_weight.shape[1] % module.MIXER_MULTIPLE == 0:
        parameters = (conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D)
        return module.mixer(tokens, in_proj_weight, *parameters, indices)

    x, z = (tokens if in_proj_weight is None else F.linear(tokens, in_proj_weight)).chunk(2, dim=-1)
    dt_rank, n = dt_proj_weight.shape[2], A.shape[2]
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        y = _in_one_scan(
            module.scan, x, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, indices
        )
        return y * F.silu(z)
    outputs = []
    for k, index in enumerate(indices):
        u = F.silu(_causal_conv(x, conv_weight[k], conv_bias[k], index))
        dt, B, C = F.linear(u, x_proj_weight[k]).split([dt_rank, n, n], dim=-1)
        delta = F.linear(dt, dt_proj_weight[k])
        y, _ = module.scan(u, delta, A[k], B.unsqueeze(2), C.unsqueeze(2), D[k], None, dt_proj_bias[k], True, index)
        outputs.append(y)
    return sum(outputs[1:], outputs[0]) * F.silu(z)


def _in_one_scan(
    scan, x, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, indices
) -> torch.Tensor:
    """
    The sum over orders from a single scan, the orders side by side as groups of channels: an exported graph then holds
    a third of the loops, and runs a third of their steps. Costs copies of the tokens in each order.
    """
    dt_rank, n = dt_proj_weight.shape[2], A.shape[2]
    inputs = []
    for k, index in enumerate(indices):
        u = x if index is None else x[:, index]
        u = F.silu(_causal_conv(u, conv_weight[k], conv_bias[k], None))
        dt, B, C = F.linear(u, x_proj_weight[k]).split([dt_rank, n, n], dim=-1)
        inputs.append((u, F.linear(dt, dt_proj_weight[k]), B, C))
    u, delta = (torch.cat(tensors, dim=2) for tensors in list(zip(*inputs))[:2])
    B, C = (torch.stack(tensors, dim=2) for tensors in list(zip(*inputs))[2:])
    y, _ = scan(u, delta, A.flatten(0, 1), B, C, D.flatten(), None, dt_proj_bias.flatten(), True, None)
    ys = y.chunk(len(indices), dim=2)
    ys = [y if index is None else torch.zeros_like(y).index_copy(1, index, y) for y, index in zip(ys, indices)]
    return sum(ys[1:], ys[0])


def _causal_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """Causal depthwise convolution of tokens (batch, L, d) along an order; weight (d, taps), bias (d,)."""
    length = x.shape[1]
    y = x * weight[:, -1] + bias
    for back in range(1, min(weight.shape[1], length)):
        tap = weight[:, -1 - back]
        if index is None:
            y = y + F.pad(x[:, : length - back] * tap, (0, 0, back, 0))
        else:
            y = y.index_add(1, index[back:], (x[:, index[: length - back]] * tap).to(y.dtype))
    return y
