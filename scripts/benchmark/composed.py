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

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from scripts.tri_orientated_mamba import TRI_ORIENTATED, ToM

__all__ = ["ComposedToM", "causal_convolution"]


def causal_convolution() -> tuple[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]]:
    """
    The causal depthwise convolution with SiLU that a user of ``mamba-ssm`` has, and its name: that of
    ``causal-conv1d``, or PyTorch's where that is missing. Takes x (B, d, L), weight (d, taps), bias (d,).
    """
    try:
        from causal_conv1d import causal_conv1d_fn
    except ImportError:
        return "torch", _convolution
    return "causal_conv1d", lambda x, weight, bias: causal_conv1d_fn(
        x, weight.to(x.dtype), bias.to(x.dtype), activation="silu"
    )


def _convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    d, taps = weight.shape
    y = F.conv1d(x, weight.unsqueeze(1).to(x.dtype), bias.to(x.dtype), padding=taps - 1, groups=d)
    return F.silu(y[..., : x.shape[2]])


class ComposedToM(nn.Module):
    """
    A ToM as it is composed around a selective scan that knows no scan order, the peer of the engines' fused ones: for
    each order a copy of the tokens, channels first, flipped or permuted, and one back.

    Args:
        layer: whose parameters are taken; of the paper's three orders, without a residual.
        scan: as mamba-ssm's ``selective_scan_fn``.
        convolve: as :py:func:`causal_convolution` returns it.

    Raises:
        ValueError: when the layer has other orders, or a residual.
    """

    def __init__(self, layer: ToM, scan: Callable[..., torch.Tensor], convolve: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        if layer.orders != TRI_ORIENTATED or layer.residual:
            raise ValueError(f"only the orders {TRI_ORIENTATED}, and no residual, are composed here: {layer}.")
        self.layer, self.scan, self.convolve = layer, scan, convolve

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: volume (B, C, D, H, W).

        Returns:
            volume of the same shape.
        """
        layer = self.layer
        depth, height, width = x.shape[2:]
        tokens, z = layer.in_proj(layer.norm(x.flatten(2).transpose(1, 2))).transpose(1, 2).chunk(2, dim=1)
        tokens = tokens.contiguous()
        A = -torch.exp(layer.A_log.float())
        dt_rank, n = layer.dt_proj_weight.shape[2], A.shape[2]
        total = tokens  # replaced by the first order's
        for k, order in enumerate(layer.orders):
            u = tokens
            if order == "reverse":
                u = u.flip(-1)
            elif order == "inter_slice":
                u = u.unflatten(2, (depth, height * width)).transpose(2, 3).flatten(2)
            u = self.convolve(u.contiguous(), layer.conv_weight[k], layer.conv_bias[k])
            dt, B, C = F.linear(u.transpose(1, 2), layer.x_proj_weight[k]).split([dt_rank, n, n], dim=-1)
            delta = (layer.dt_proj_weight[k].to(dt.dtype) @ dt.transpose(1, 2)).contiguous()
            B, C = (t.transpose(1, 2).contiguous() for t in (B, C))
            y = self.scan(
                u, delta, A[k], B, C, layer.D[k].float(), delta_bias=layer.dt_proj_bias[k].float(), delta_softplus=True
            )
            if order == "reverse":
                y = y.flip(-1)
            elif order == "inter_slice":
                y = y.unflatten(2, (height * width, depth)).transpose(2, 3).flatten(2)
            total = total + y if k else y
        y = layer.out_proj((total * F.silu(z)).transpose(1, 2))
        return y.transpose(1, 2).reshape(x.shape[0], -1, depth, height, width)
