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

__all__ = ["inference_step", "training_step"]


def inference_step(network: torch.nn.Module, image: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """
    One forward pass without gradients.

    Args:
        network: in evaluation mode.
        image: (B, C, D, H, W).
        dtype: of autocast; None for none.
    """
    with torch.inference_mode(), torch.autocast(image.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        network(image)


def training_step(
    network: torch.nn.Module,
    image: torch.Tensor,
    dtype: torch.dtype | None = None,
    label: torch.Tensor | None = None,
    loss_function: Callable[..., torch.Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """
    Forward, loss and backward, and a step of the optimizer where one is given. The gradients are let go at the end.

    Args:
        network: in training mode.
        image: (B, C, D, H, W).
        dtype: of autocast; None for none.
        label: (B, 1, D, H, W), class numbers.
        loss_function: takes logits and label; default: the logits' mean square.
        optimizer: of the network's parameters.
    """
    with torch.autocast(image.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        logits = network(image).float()
        loss = logits.square().mean() if loss_function is None else loss_function(logits, label)
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    network.zero_grad(set_to_none=True)
