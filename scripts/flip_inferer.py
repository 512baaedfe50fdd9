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

from collections.abc import Callable, Sequence
from itertools import chain, combinations
from typing import Any

import torch
from monai.inferers import Inferer

__all__ = ["FlipInferer"]


class FlipInferer(Inferer):
    """
    Test-time flipping: runs another inferer on the volume and on its mirror images, and returns the mean of the
    network's outputs, mirrored back.

    Args:
        inferer: the inferer to run, such as ``SlidingWindowInferer``; its network returns one tensor.
        flip_axes: spatial axes from 0. Every combination of them is run, so the time grows 2^n-fold; none leaves the
            inferer as it is.

    Raises:
        ValueError: When an axis is named twice or is none of 0, 1, 2.
    """

    def __init__(self, inferer: Inferer, flip_axes: Sequence[int] = ()) -> None:
        super().__init__()
        if len(set(flip_axes)) < len(flip_axes) or set(flip_axes) - {0, 1, 2}:
            raise ValueError(f"flip_axes must be different axes out of 0, 1 and 2, got {list(flip_axes)}.")
        self.inferer = inferer
        axes = [axis + 2 for axis in flip_axes]
        self._flips = list(chain.from_iterable(combinations(axes, n) for n in range(len(axes) + 1)))

    def __call__(self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """
        Args:
            inputs: volume (B, C, D, H, W).
            network: callable that maps a volume to logits.
            args: passed on to the inferer.
            kwargs: passed on to the inferer.

        Returns:
            mean logits (B, classes, D, H, W); with no axes whatever the inferer returns.
        """
        output = self.inferer(inputs, network, *args, **kwargs)
        for flip in self._flips[1:]:
            output = output + self.inferer(inputs.flip(flip), network, *args, **kwargs).flip(flip)
        return output / len(self._flips) if len(self._flips) > 1 else output
