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

import math
from collections.abc import Sequence

import torch
import torch.nn as nn

from scripts.selective_scan import oriented_mixer

__all__ = ["ToM", "TRI_ORIENTATED"]

TRI_ORIENTATED = ("forward", "reverse", "inter_slice")


class ToM(nn.Module):
    """
    Tri-orientated Mamba (SegResMamba section 2.1, Figure 1c; the layer is SegMamba's): LayerNorm, then one Mamba-1
    mixer that walks the volume in several scan orders. The orders share ``in_proj`` and ``out_proj`` and own
    everything else, stacked along the first axis of each parameter. The outputs of the orders are summed in raster
    order and gated once, since the gate of a voxel is the same for every order.

    Works on any spatial size: an order is an index over the level's real size and no copy is permuted or flipped. What
    autograd keeps of a voxel, each engine's ``mixer`` says.

    Args:
        channels: number of channels C of the volume.
        orders: scan orders, see :py:func:`scripts.selective_scan.order_index`. Default: the paper's three.
        d_state: size of the state of each channel.
        d_conv: taps of the causal depthwise convolution along each order.
        expand: the mixer's inner width is ``expand * channels``.
        dt_rank: rank of the projection that makes the step sizes; default ``ceil(channels / 16)``.
        residual: add the input to the output.
        scan_engine: name of a scan engine or ``"auto"``, see :py:func:`scripts.selective_scan.selective_scan`.

    Raises:
        ValueError: when ``orders`` is empty.
    """

    def __init__(
        self,
        channels: int,
        orders: Sequence[str] = TRI_ORIENTATED,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        residual: bool = False,
        scan_engine: str = "auto",
    ) -> None:
        super().__init__()
        if not orders:
            raise ValueError("orders must hold at least one scan order.")
        self.orders = tuple(orders)
        self.residual = residual
        self.scan_engine = scan_engine
        k, d_inner = len(self.orders), expand * channels
        dt_rank = dt_rank or math.ceil(channels / 16)

        self.norm = nn.LayerNorm(channels)
        self.in_proj = nn.Linear(channels, 2 * d_inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(k, d_inner, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(k, d_inner))
        self.x_proj_weight = nn.Parameter(torch.empty(k, dt_rank + 2 * d_state, d_inner))
        self.dt_proj_weight = nn.Parameter(torch.empty(k, d_inner, dt_rank))
        self.dt_proj_bias = nn.Parameter(torch.empty(k, d_inner))
        self.A_log = nn.Parameter(torch.empty(k, d_inner, d_state))
        self.D = nn.Parameter(torch.empty(k, d_inner))
        self.out_proj = nn.Linear(d_inner, channels, bias=False)
        self.reset_parameters()

    def reset_parameters(self, dt_min: float = 1e-3, dt_max: float = 0.1, dt_init_floor: float = 1e-4) -> None:
        """
        Mamba-1's initialisation: S4D-real ``A = -(1, ..., d_state)``, and a step-size bias whose softplus is
        log-uniform in ``[dt_min, dt_max]``; the rest as ``nn.Conv1d`` and ``nn.Linear`` start.
        """
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()
        self.norm.reset_parameters()
        _, d_inner, d_conv = self.conv_weight.shape
        d_state, dt_rank = self.A_log.shape[-1], self.dt_proj_weight.shape[-1]
        for parameter, fan_in in (
            (self.conv_weight, d_conv),
            (self.conv_bias, d_conv),
            (self.x_proj_weight, d_inner),
            (self.dt_proj_weight, dt_rank),
        ):
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)
        with torch.no_grad():
            log_dt = torch.empty_like(self.dt_proj_bias).uniform_(math.log(dt_min), math.log(dt_max))
            dt = log_dt.exp().clamp(min=dt_init_floor)
            self.dt_proj_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            self.A_log.copy_(torch.arange(1, d_state + 1).log().expand_as(self.A_log))
            self.D.fill_(1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: volume (B, C, D, H, W).

        Returns:
            volume of the same shape and memory format.
        """
        spatial_shape = x.shape[2:]
        y = oriented_mixer(
            *self._in_proj(self.norm(x.flatten(2).transpose(1, 2))),  # b c d h w -> b (d h w) c
            self.conv_weight,
            self.conv_bias,
            self.x_proj_weight,
            self.dt_proj_weight,
            self.dt_proj_bias,
            -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32))),
            self.D,
            orders=self.orders,
            spatial_shape=spatial_shape,
            engine=self.scan_engine,
        )
        y = self.out_proj(y).transpose(1, 2).unflatten(2, spatial_shape)  # b (d h w) c -> b c d h w
        if not x.is_contiguous(memory_format=torch.channels_last_3d):
            y = y.contiguous()
        return x + y if self.residual else y

    def _in_proj(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The tokens and the weight of ``in_proj``, which an engine may take in two halves; or x and z, made here, where
        it is more than a weight: wrapped by an adapter, quantised, with hooks.
        """
        linear = self.in_proj
        hooks = [linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks]
        if type(linear) is nn.Linear and linear.bias is None and not any(hooks):
            return tokens, linear.weight
        return linear(tokens), None

    def extra_repr(self) -> str:
        return f"orders={self.orders}, residual={self.residual}, scan_engine={self.scan_engine!r}"
