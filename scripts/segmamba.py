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
from typing import Any

import torch
import torch.nn as nn
from monai.networks.blocks import UnetOutBlock, UnetrBasicBlock, UnetrUpBlock

from scripts.segresmamba import ChannelMLP, GatedSpatialConvBlock, InstanceNorm, take_single_voxels

__all__ = ["SegMamba"]


class SegMamba(nn.Module):
    """
    SegMamba (Xing et al., arXiv:2401.13560), the network that SegResMamba descends from and is measured against: a
    stem of stride 2, at each level a gated spatial convolution and ToM layers with a residual
    (:py:class:`scripts.segresmamba.GatedSpatialConvBlock`), an MLP on each level's output, and UNETR's decoder. Not
    the network of the same name of Taming Mambas (:py:class:`scripts.taming_mambas.TamingMambas`).

    Takes volumes of a multiple of ``2 ** levels`` voxels an axis; :py:class:`scripts.any_size.AnySize` around it, as in
    its overlay, takes any.

    Args:
        spatial_dims: 3.
        in_channels: number of channels of the image.
        out_channels: number of classes.
        channels: of each level of the encoder.
        depths: number of ToM layers at each level.
        hidden_size: channels of the bottleneck.
        **tom: keyword arguments of :py:class:`scripts.tri_orientated_mamba.ToM`.

    Raises:
        ValueError: when ``spatial_dims`` is not 3, or ``channels`` and ``depths`` differ in length.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 2,
        channels: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 2, 2),
        hidden_size: int = 768,
        **tom: Any,
    ) -> None:
        super().__init__()
        if spatial_dims != 3:
            raise ValueError(f"spatial_dims must be 3, got {spatial_dims}.")
        if len(channels) != len(depths):
            raise ValueError(f"channels and depths must be as many, got {len(channels)} and {len(depths)}.")
        self.stem = nn.Conv3d(in_channels, channels[0], 7, stride=2, padding=3)
        self.downsamples = nn.ModuleList([nn.Identity()])
        self.downsamples.extend(
            nn.Sequential(InstanceNorm(a), nn.Conv3d(a, b, 2, stride=2)) for a, b in zip(channels, channels[1:])
        )
        self.blocks = nn.ModuleList(GatedSpatialConvBlock(c, depth, tom) for c, depth in zip(channels, depths))
        self.mlps = nn.ModuleList(ChannelMLP(c) for c in channels)
        widths = (*channels, hidden_size)  # of the skips, from the input's resolution to the bottleneck

        def block(a: int, b: int) -> UnetrBasicBlock:
            return UnetrBasicBlock(3, a, b, kernel_size=3, stride=1, norm_name="instance", res_block=True)

        self.skips = nn.ModuleList(block(a, b) for a, b in zip((in_channels, *channels), widths))
        self.ups = nn.ModuleList(
            UnetrUpBlock(3, b, a, kernel_size=3, upsample_kernel_size=2, norm_name="instance", res_block=True)
            for a, b in zip(widths[-2::-1], widths[:0:-1])
        )
        self.last = block(channels[0], channels[0])
        self.head = UnetOutBlock(3, channels[0], out_channels)
        take_single_voxels(self)  # which the bottleneck may be

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: image (B, in_channels, D, H, W), each axis a multiple of ``2 ** levels``.

        Returns:
            logits (B, out_channels, D, H, W).
        """
        features = [x]
        y = self.stem(x)
        for downsample, block, mlp in zip(self.downsamples, self.blocks, self.mlps):
            y = block(downsample(y))
            features.append(mlp(y))
        skips = [skip(feature) for skip, feature in zip(self.skips, features)]
        y = skips.pop()
        for up in self.ups:
            y = up(y, skips.pop())
        return self.head(self.last(y))
