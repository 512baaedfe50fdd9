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

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.transforms.utils import compute_divisible_spatial_size

__all__ = ["AnySize"]


class AnySize(nn.Module):
    """
    Lets a network that asks for sizes of a multiple take any volume: it is padded behind with zeros, and the logits are
    cut back. Many of MONAI's networks ask for one, and SegResMamba's tasks do not keep to it.

    Args:
        network: maps a volume to logits of the same size.
        multiple: of which each axis of a volume must be for the network.
        least: voxels that each axis must have for the network.

    Raises:
        ValueError: when ``multiple`` is below 1.
    """

    def __init__(self, network: nn.Module, multiple: int, least: int = 0) -> None:
        super().__init__()
        if multiple < 1:
            raise ValueError(f"multiple must be at least 1, got {multiple}.")
        self.network = network
        self.multiple = multiple
        self.least = least

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: volume (B, C, D, H, W).

        Returns:
            logits (B, out_channels, D, H, W).
        """
        d, h, w = x.shape[2:]
        padded = compute_divisible_spatial_size([max(size, self.least) for size in (d, h, w)], self.multiple)
        x = F.pad(x, (0, padded[2] - w, 0, padded[1] - h, 0, padded[0] - d))
        return self.network(x)[:, :, :d, :h, :w]
