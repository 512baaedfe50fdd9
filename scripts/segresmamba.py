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
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.networks.blocks import UpSample
from monai.networks.blocks.segresnet_block import ResBlock
from monai.utils import ensure_tuple_rep
from torch.utils.checkpoint import checkpoint

from scripts.tri_orientated_mamba import TRI_ORIENTATED, ToM

__all__ = [
    "ChannelMLP",
    "ConvMambaMixedBlock",
    "GatedSpatialConvBlock",
    "InstanceNorm",
    "SegResMamba",
    "take_single_voxels",
]


class InstanceNorm(nn.InstanceNorm3d):
    """
    ``nn.InstanceNorm3d`` that also takes a volume of a single voxel, which small inputs reach on the deepest level:
    its normalised value is zero, where PyTorch raises an error.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if math.prod(input.shape[2:]) == 1:
            return input - input
        return super().forward(input)


def take_single_voxels(network: nn.Module) -> None:
    """
    Put :py:class:`InstanceNorm` in the place of each ``nn.InstanceNorm3d`` that MONAI's blocks have made.

    Args:
        network: changed in place, before it is trained.
    """
    for module in list(network.modules()):
        for name, norm in module.named_children():
            if type(norm) is nn.InstanceNorm3d:
                setattr(module, name, InstanceNorm(norm.num_features, affine=norm.affine))


class ChannelMLP(nn.Sequential):
    """
    InstanceNorm and an MLP on the channels of each voxel (SegResMamba section 2.1; SegMamba has the same).

    Args:
        channels: number of channels C; 2 C inside.
    """

    def __init__(self, channels: int) -> None:
        hidden = 2 * channels
        super().__init__(
            InstanceNorm(channels), nn.Conv3d(channels, hidden, 1), nn.GELU(), nn.Conv3d(hidden, channels, 1)
        )


def _residual_block(channels: int) -> ResBlock:
    """Pre-activation residual block. 8 groups; 4 for 8 channels, so that a group never is a single value."""
    return ResBlock(3, channels, norm=("GROUP", {"num_groups": min(8, channels // 2)}))


class _ConvNormReLU(nn.Sequential):
    """CIR: convolution, InstanceNorm, ReLU."""

    def __init__(self, channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv3d(channels, channels, kernel_size, stride, kernel_size // 2),
            InstanceNorm(channels),
            nn.ReLU(inplace=True),
        )


def _stage(channels: int, depth: int, conv: bool, tom: dict | None) -> nn.Sequential:
    """``depth`` times ToM, each followed by a 3x3x3 convolution where ``conv`` is on; without ToM the conv alone."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        if tom is not None:
            layers.append(ToM(channels, **tom))
        if conv:
            layers.append(nn.Conv3d(channels, channels, 3, padding=1))
    return nn.Sequential(*layers)


class ConvMambaMixedBlock(nn.Module):
    """
    Convolution-Mamba mixed block, CMMB (SegResMamba section 2.1, Algorithm 1, Figure 1b).

    Args:
        channels: number of channels C.
        depth: how often ToM follows the sum with the input.
        stage_conv: a 3x3x3 convolution after each of those.
        tom: keyword arguments of :py:class:`ToM`, or None for the block without ToM (Table 5).
    """

    def __init__(self, channels: int, depth: int = 1, stage_conv: bool = False, tom: dict | None = None) -> None:
        super().__init__()
        self.conv1 = _ConvNormReLU(channels, 5, stride=2)
        self.conv2 = _ConvNormReLU(channels, 3)
        self.tom = ToM(channels, **tom) if tom is not None else nn.Identity()
        self.conv3 = _ConvNormReLU(channels, 3)
        self.up = nn.ConvTranspose3d(channels, channels, 5, stride=2, padding=2)
        self.up_norm = InstanceNorm(channels)
        self.stage = _stage(channels, depth, stage_conv, tom)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: volume (B, C, D, H, W).

        Returns:
            volume of the same shape.
        """
        y = self.conv3(self.tom(self.conv2(self.conv1(x))))
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # without a condition on symbolic sizes
            y = F.conv_transpose3d(y, self.up.weight, self.up.bias, stride=2, padding=2, output_padding=1)
            y = _crop(y, x.shape[2:])
        else:
            y = self.up(y, output_size=x.shape[2:])  # the exact size, also where it is odd
        return self.stage(F.relu(self.up_norm(y)) + x)


class GatedSpatialConvBlock(nn.Module):
    """
    SegMamba's encoder block (arXiv:2401.13560) for the first row of SegResMamba's Table 4: gated spatial convolution
    (GSC), two 3x3x3 convolutions gated, as the text has it, by the product with a 1x1x1 convolution of the same input,
    then a 1x1x1 convolution and the input added; then ``depth`` times ToM with a residual.

    Args:
        channels: number of channels C.
        depth: number of ToM layers.
        tom: keyword arguments of :py:class:`ToM`, or None for none.
    """

    def __init__(self, channels: int, depth: int = 2, tom: dict | None = None) -> None:
        super().__init__()
        self.spatial = nn.Sequential(_ConvNormReLU(channels, 3), _ConvNormReLU(channels, 3))
        self.gate = _ConvNormReLU(channels, 1)
        self.proj = _ConvNormReLU(channels, 1)
        self.stage = _stage(channels, depth, False, None if tom is None else {**tom, "residual": True})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: volume (B, C, D, H, W).

        Returns:
            volume of the same shape.
        """
        return self.stage(self.proj(self.spatial(x) * self.gate(x)) + x)


class _Downsample(nn.Module):
    """InstanceNorm, the paper's additional 3x3x3 convolution, InstanceNorm, 2x2x2 convolution of stride 2."""

    def __init__(self, in_channels: int, out_channels: int, additional_conv: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [InstanceNorm(in_channels)]
        if additional_conv:
            layers += [nn.Conv3d(in_channels, in_channels, 3, padding=1), InstanceNorm(in_channels)]
        self.body = nn.Sequential(*layers)
        self.conv = nn.Conv3d(in_channels, out_channels, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        d, h, w = (size % 2 for size in x.shape[2:])
        if torch.compiler.is_exporting() or d or h or w:  # the last plane of an odd size is not dropped
            x = F.pad(x, (0, w, 0, h, 0, d))
        return self.conv(x)


def _run(module: Callable[..., torch.Tensor], x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """
    A part of the network, in float32 where the volume is small and autocast on the CPU is on: there oneDNN's bfloat16
    weight gradient is wrong, up to corrupted memory, for a kernel about as large as its volume (seen with torch 2.13
    and AVX512_BF16). Volumes this small are a small part of the work.
    """
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and min(x.shape[2:]) <= 8:
        with torch.autocast("cpu", enabled=False):
            return module(x.float(), *(other.float() for other in others))
    return module(x, *others)


def _crop(x: torch.Tensor, spatial_shape: Sequence[int]) -> torch.Tensor:
    """Drop the voxels that doubling has put beyond an odd size."""
    if torch.compiler.is_exporting():  # unlike a slice, this leaves no condition on symbolic sizes
        for axis, size in enumerate(spatial_shape, start=2):
            x = x.index_select(axis, torch.arange(size, device=x.device))
        return x
    d, h, w = spatial_shape
    return x[:, :, :d, :h, :w]


class _UpStage(nn.Module):
    """1x1x1 convolution, trilinear upsampling, the skip added, one pre-activation residual block."""

    def __init__(self, in_channels: int, out_channels: int, scale_factor: Sequence[int] = (2, 2, 2)) -> None:
        super().__init__()
        self.reduce = nn.Conv3d(in_channels, out_channels, 1, bias=False)
        self.up = UpSample(
            3, out_channels, out_channels, scale_factor=scale_factor, mode="nontrainable", align_corners=False
        )
        self.block = _residual_block(out_channels)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return self.block(_crop(self.up(self.reduce(x)), skip.shape[2:]) + skip)


class SegResMamba(nn.Module):
    """
    SegResMamba: convolution-Mamba encoder and light convolutional decoder for 3D medical image segmentation
    (MIDL 2025, PMLR 301, arXiv:2503.07766). A stem of stride 2, at each level a mixed block
    (:py:class:`ConvMambaMixedBlock`), skips through an MLP that are summed, not concatenated, and trilinear
    upsampling. Takes volumes of any size from 8 voxels an axis; no multiple of anything is needed.

    ``depths=(1, 1, 1, 1), stage_conv=False`` is the network that the paper's text describes (68.26 M parameters),
    the default the one that its tables measured (80.40 M, without the paper's 39.58 M unused ones).

    Args:
        spatial_dims: number of spatial axes; 3 only.
        in_channels: channels of the input (modalities).
        out_channels: channels of the output (classes).
        channels: width of each level, at least two levels, each a multiple of 8 (the decoder's GroupNorm).
        depths: number of ToM layers that end each level.
        stage_conv: a 3x3x3 convolution after each of them (block ``"cmmb"`` only).
        use_tom: with ToM; False gives the ablation of Table 5.
        downsample_conv: the additional convolution before downsampling; False gives Table 4, Exp. 2.
        block: ``"cmmb"``, or ``"gsc"`` for SegMamba's encoder block; with ``downsample_conv=False`` Table 4, Exp. 1.
        residual: add each ToM's input to its output. The paper does not say; always on in block ``"gsc"``.
        orders: scan orders of each ToM.
        d_state: size of the state of each channel.
        d_conv: taps of the causal convolution along each order.
        expand: inner width of ToM over the level's channels.
        stem_stride: stride of the stem, 1 or 2, one number or one for each axis: 1 along an axis of coarse spacing
            keeps its resolution, 1 along all gives the first level the input's own.
        full_resolution_skip: channels of a path at the input's own resolution that is added to the decoder's output
            and takes the place of the transposed convolution in the head; 0 (the paper's network) for none. Meant
            for small structures.
        deep_supervision: in training, also return the logits of the decoder's levels, at their own sizes; not in the
            paper.
        dropout: probability with which each channel of a level's output is zeroed in training; not in the paper. MONAI
            Label sets it for the uncertainty by which it ranks unlabelled volumes.
        scan_engine: name of a scan engine or ``"auto"``, see :py:func:`scripts.selective_scan.selective_scan`.
        use_checkpoint: activation checkpointing of the mixed blocks: less training memory, more time.

    Raises:
        ValueError: when an argument is outside of the above, or a volume is too small or has other channels.

    Example::

        network = SegResMamba(in_channels=1, out_channels=14, channels=(16, 32, 64, 128))
        logits = network(torch.rand(1, 1, 37, 64, 51))  # (1, 14, 37, 64, 51)
    """

    MIN_SIZE = 8

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 2,
        channels: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 2, 2),
        stage_conv: bool = True,
        *,
        use_tom: bool = True,
        downsample_conv: bool = True,
        block: str = "cmmb",
        residual: bool = False,
        orders: Sequence[str] = TRI_ORIENTATED,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        stem_stride: int | Sequence[int] = 2,
        full_resolution_skip: int = 0,
        deep_supervision: bool = False,
        dropout: float = 0.0,
        scan_engine: str = "auto",
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if spatial_dims != 3:
            raise ValueError(f"SegResMamba segments volumes: spatial_dims must be 3, got {spatial_dims}.")
        if len(channels) < 2 or any(c % 8 or c <= 0 for c in (*channels, full_resolution_skip or 8)):
            raise ValueError(
                "channels must hold at least two levels, and each of them (and full_resolution_skip) be a positive "
                f"multiple of 8, got channels={tuple(channels)}, full_resolution_skip={full_resolution_skip}."
            )
        if len(depths) != len(channels) or min(depths) < 0:
            raise ValueError(
                f"depths must hold a number from 0 for each of the levels {tuple(channels)}, got {tuple(depths)}."
            )
        if block not in ("cmmb", "gsc"):
            raise ValueError(f"block must be 'cmmb' or 'gsc', got {block!r}.")
        stride: tuple[int, int, int] = ensure_tuple_rep(stem_stride, 3)
        if set(stride) - {1, 2}:
            raise ValueError(f"stem_stride must be 1 or 2 along each axis, got {stride}.")
        self.in_channels = in_channels
        self.use_checkpoint = use_checkpoint
        self.deep_supervision = deep_supervision
        tom = None
        if use_tom:
            tom = dict(orders=orders, d_state=d_state, d_conv=d_conv, expand=expand, residual=residual)
            tom["scan_engine"] = scan_engine

        self.stem = nn.Conv3d(in_channels, channels[0], 7, stride=stride, padding=3)
        self.downsamples = nn.ModuleList([nn.Identity()])
        self.downsamples.extend(_Downsample(a, b, downsample_conv) for a, b in zip(channels, channels[1:]))
        self.blocks = nn.ModuleList(
            ConvMambaMixedBlock(c, depth, stage_conv, tom) if block == "cmmb" else GatedSpatialConvBlock(c, depth, tom)
            for c, depth in zip(channels, depths)
        )
        self.dropout = nn.Dropout3d(dropout)
        self.skips = nn.ModuleList(ChannelMLP(c) for c in channels)
        self.up_stages = nn.ModuleList(_UpStage(b, a) for a, b in zip(channels[-2::-1], channels[:0:-1]))
        if full_resolution_skip:
            width = full_resolution_skip
            self.full_resolution: nn.Module | None = nn.Sequential(
                nn.Conv3d(in_channels, width, 3, padding=1), _residual_block(width)
            )
            self.up = _UpStage(channels[0], width, stride)
            self.head: nn.Module = nn.Conv3d(width, out_channels, 1)
        else:
            self.full_resolution = None
            self.head = nn.ConvTranspose3d(channels[0], out_channels, stride, stride=stride)
        self.level_heads = nn.ModuleList(nn.Conv3d(c, out_channels, 1) for c in channels[:-1] if deep_supervision)

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """
        Args:
            x: volume (B, in_channels, D, H, W), any D, H, W >= 8.

        Returns:
            logits (B, out_channels, D, H, W); in training with ``deep_supervision`` a list of them, from the full size
            to the smallest.
        """
        if x.ndim != 5 or x.shape[1] != self.in_channels or any(size < self.MIN_SIZE for size in x.shape[2:]):
            raise ValueError(
                f"expected a volume (B, {self.in_channels}, D, H, W) of at least {self.MIN_SIZE} voxels an axis, "
                f"got shape {tuple(x.shape)}."
            )
        y = self.stem(x)
        skips = []
        for downsample, block, skip in zip(self.downsamples, self.blocks, self.skips):
            y = _run(downsample, y)
            if self.use_checkpoint and torch.is_grad_enabled():
                y = _run(partial(checkpoint, block, use_reentrant=False), y)
            else:
                y = _run(block, y)
            y = self.dropout(y)
            skips.append(_run(skip, y))
        y = skips.pop()
        levels: list[torch.Tensor] = []
        for up_stage in self.up_stages:
            y = _run(up_stage, y, skips.pop())
            levels.insert(0, y)
        if self.full_resolution is not None:
            y = self.up(y, self.full_resolution(x))
        logits = _crop(self.head(y), x.shape[2:])
        if self.deep_supervision and self.training:
            return [logits, *(_run(head, level) for head, level in zip(self.level_heads, levels))]
        return logits
