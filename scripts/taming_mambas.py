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
from typing import Any

import torch
import torch.nn as nn
from monai.networks.blocks.dynunet_block import UnetResBlock

from scripts.segresmamba import take_single_voxels
from scripts.tri_orientated_mamba import ToM

__all__ = ["BidirectionalMambaLayer", "MambaLayer", "TamingMambas", "VARIANTS"]

VARIANTS = ("SegMamba", "SegMambaSkip", "BiSegMamba", "MultiSegMamba", "UMambaBot", "UMambaEnc")
MULTI_ORDERS = ("hwd", "hdw", "whd", "dwh")  # footnote 2; letters from the slowest axis to the fastest


class MambaLayer(nn.Module):
    """
    Mamba layer of Taming Mambas (section 3.2, Fig. 1a): LayerNorm, Mamba block and skip, then LayerNorm, MLP and skip.

    Args:
        channels: number of channels C of the volume.
        order: scan order, see :py:func:`scripts.selective_scan.order_index`.
        mlp_ratio: width of the MLP's hidden layer, with GELU, over C; None for a single linear layer.
        tom: keyword arguments of :py:class:`ToM`.
    """

    def __init__(self, channels: int, order: str = "dhw", mlp_ratio: float | None = None, **tom: Any) -> None:
        super().__init__()
        self.mamba = ToM(channels, orders=(order,), residual=True, **tom)
        self.norm = nn.LayerNorm(channels)
        if mlp_ratio is None:
            self.mlp: nn.Module = nn.Linear(channels, channels)
        else:
            hidden = round(mlp_ratio * channels)
            self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: volume (B, C, D, H, W).

        Returns:
            volume of the same shape.
        """
        x = self.mamba(x)
        return x + self.mlp(self.norm(x.movedim(1, -1))).movedim(-1, 1)


class BidirectionalMambaLayer(nn.Module):
    """
    Bidirectional 3D Mamba layer of Taming Mambas (section 3.2, Fig. 1b): two Mamba layers, one of which walks the
    sequence backwards; their sum, normalised.

    Args:
        channels: number of channels C of the volume.
        order: scan order of the one, reversed for the other.
        **layer: further arguments of :py:class:`MambaLayer`.
    """

    def __init__(self, channels: int, order: str = "dhw", **layer: Any) -> None:
        super().__init__()
        self.forwards = MambaLayer(channels, order, **layer)
        self.backwards = MambaLayer(channels, f"-{order}", **layer)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: volume (B, C, D, H, W).

        Returns:
            volume of the same shape.
        """
        return self.norm((self.forwards(x) + self.backwards(x)).movedim(1, -1)).movedim(-1, 1)


class _Mean(nn.Module):
    """The mean over layers that are given the same volume (Fig. 3)."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = [layer(x) for layer in self.layers]
        return sum(outputs[1:], outputs[0]) / len(outputs)


class _UpStage(nn.Module):
    """Transposed convolution to the skip's size, concatenation, residual blocks."""

    def __init__(self, in_channels: int, channels: int, kernel_size, stride, blocks: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(in_channels, channels, stride, stride)
        self.blocks = _blocks(2 * channels, channels, kernel_size, 1, blocks)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        d, h, w = skip.shape[2:]
        return self.blocks(torch.cat([self.up(x)[..., :d, :h, :w], skip], dim=1))


def _blocks(in_channels: int, channels: int, kernel_size, stride, count: int) -> nn.Sequential:
    """nnU-Net's residual blocks, the first of which may change channels and size."""
    norm = ("instance", {"affine": True})
    first = UnetResBlock(3, in_channels, channels, kernel_size, stride, norm)
    return nn.Sequential(first, *(UnetResBlock(3, channels, channels, kernel_size, 1, norm) for _ in range(count - 1)))


class TamingMambas(nn.Module):
    """
    The networks of Taming Mambas for Voxel Level 3D Medical Image Segmentation (Lumetti et al.): nnU-Net's residual
    U-Net with Mamba layers (section 3.2, Fig. 2). They are not the SegMamba that SegResMamba descends from.

    - ``"SegMamba"``: a Mamba layer at the end of each level of the encoder, that is before each downsampling and in the
      bottleneck.
    - ``"BiSegMamba"``: the bidirectional layer in the same places.
    - ``"MultiSegMamba"``: the mean of four bidirectional layers, on four orders of the axes, in the same places.
    - ``"SegMambaSkip"``: the plain body, with a bidirectional layer in each skip connection.
    - ``"UMambaBot"``, ``"UMambaEnc"``: two networks that the paper compares with, U-Mamba (Ma et al.,
      arXiv:2401.04722), on the same body: after the residual blocks of the bottleneck, or of each level of the encoder,
      LayerNorm and a Mamba block with 16 states, without skip and MLP.

    The defaults are the plan for Synapse (patch 48 x 192 x 192). Takes volumes of any size: upwards, what goes beyond
    the skip's size is cut off.

    Args:
        spatial_dims: 3.
        in_channels: number of channels of the image.
        out_channels: number of classes.
        variant: one of ``VARIANTS``, or None for the body alone.
        channels: of each level.
        kernel_size: of each level's convolutions.
        strides: of each level's first convolution.
        blocks: residual blocks a level, in encoder and decoder.
        mlp_ratio: see :py:class:`MambaLayer`.
        max_d_state: a level of C channels has min(C, ``max_d_state``) states (not in U-Mamba's variants).
        d_conv: taps of Mamba's convolution.
        expand: Mamba's inner width over C.
        deep_supervision: in training, also return the logits of the decoder's lower levels, at their own sizes.
        scan_engine: see :py:class:`ToM`.

    Raises:
        ValueError: when ``variant`` is unknown, ``spatial_dims`` is not 3, or the levels' settings differ in number.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 2,
        variant: str | None = "SegMamba",
        channels: Sequence[int] = (32, 64, 128, 256, 320, 320),
        kernel_size: Sequence[Sequence[int] | int] = ((1, 3, 3), 3, 3, 3, 3, 3),
        strides: Sequence[Sequence[int] | int] = (1, (1, 2, 2), 2, 2, 2, (1, 2, 2)),
        blocks: int = 2,
        mlp_ratio: float | None = None,
        max_d_state: int = 256,
        d_conv: int = 4,
        expand: int = 2,
        deep_supervision: bool = False,
        scan_engine: str = "auto",
    ) -> None:
        super().__init__()
        if spatial_dims != 3:
            raise ValueError(f"spatial_dims must be 3, got {spatial_dims}.")
        if variant is not None and variant not in VARIANTS:
            raise ValueError(f"unknown variant {variant!r}: expected one of {', '.join(VARIANTS)}, or None.")
        if not len(channels) == len(kernel_size) == len(strides) >= 2:
            raise ValueError(
                "channels, kernel_size and strides must have one value a level, of 2 levels or more: got "
                f"{len(channels)}, {len(kernel_size)} and {len(strides)}."
            )
        self.deep_supervision = deep_supervision
        kernels, steps = ([(k,) * 3 if isinstance(k, int) else tuple(k) for k in ks] for ks in (kernel_size, strides))

        def mamba(c: int, wanted: Sequence[str]) -> nn.Module:
            if variant not in wanted:
                return nn.Identity()
            options: dict[str, Any] = {"d_conv": d_conv, "expand": expand, "scan_engine": scan_engine}
            if variant in ("UMambaBot", "UMambaEnc"):
                return ToM(c, orders=("dhw",), **options)
            options |= {"d_state": min(c, max_d_state), "mlp_ratio": mlp_ratio}
            if variant == "SegMamba":
                return MambaLayer(c, **options)
            if variant == "MultiSegMamba":
                return _Mean([BidirectionalMambaLayer(c, order, **options) for order in MULTI_ORDERS])
            return BidirectionalMambaLayer(c, **options)

        inputs = [in_channels, *channels[:-1]]
        self.encoder = nn.ModuleList(
            _blocks(before, c, kernel, step, blocks)
            for before, c, kernel, step in zip(inputs, channels, kernels, steps)
        )
        everywhere = ("SegMamba", "BiSegMamba", "MultiSegMamba", "UMambaEnc")
        self.mamba = nn.ModuleList(mamba(c, everywhere) for c in channels[:-1])
        self.mamba.append(mamba(channels[-1], (*everywhere, "UMambaBot")))
        self.skips = nn.ModuleList(mamba(c, ("SegMambaSkip",)) for c in channels[:-1])
        self.decoder = nn.ModuleList(
            _UpStage(channels[i + 1], channels[i], kernels[i], steps[i + 1], blocks) for i in range(len(channels) - 1)
        )
        heads = channels[:-1] if deep_supervision else channels[:1]
        self.heads = nn.ModuleList(nn.Conv3d(c, out_channels, 1) for c in heads)
        self._initialise()

    def _initialise(self) -> None:
        """Residual layers' weights scaled by 1 / sqrt(N), N of them (section 3.3); norms that take single voxels."""
        layers = [module for module in self.modules() if isinstance(module, MambaLayer)]
        with torch.no_grad():
            for layer in layers:
                *_, last = (module for module in layer.mlp.modules() if isinstance(module, nn.Linear))
                for linear in (layer.mamba.out_proj, last):
                    linear.weight.div_(math.sqrt(2 * len(layers)))
        take_single_voxels(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """
        Args:
            x: image (B, in_channels, D, H, W).

        Returns:
            logits (B, out_channels, D, H, W); in training with ``deep_supervision`` a list of them, from the full size
            to the smallest.
        """
        features = []
        for stage, mamba in zip(self.encoder, self.mamba):
            x = mamba(stage(x))
            features.append(x)
        logits: list[torch.Tensor] = []
        for i in reversed(range(len(self.decoder))):
            x = self.decoder[i](x, self.skips[i](features[i]))
            if i == 0 or (self.deep_supervision and self.training):
                logits.insert(0, self.heads[i](x))
        return logits if self.deep_supervision and self.training else logits[0]
