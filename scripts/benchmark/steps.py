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

import monai
import torch

from scripts.autocast_inferer import autocast

from .measuring import synchronize

__all__ = ["DTYPES", "inference_step", "make_step", "training_step"]

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of autocast, by the configs' names."""


def inference_step(network: torch.nn.Module, image: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """
    One forward pass without gradients.

    Args:
        network: in evaluation mode.
        image: (B, C, D, H, W).
        dtype: of autocast; None for none.
    """
    with torch.inference_mode(), autocast(image.device.type, dtype):
        network(image)


def training_step(network: torch.nn.Module, image: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """
    Forward and backward of the logits' mean square, times 2^12, so that float16 has numbers for the gradients: sums of
    zeros would take less power, and perhaps time. The gradients are let go at the end.

    Args:
        network: in training mode.
        image: (B, C, D, H, W).
        dtype: of autocast; None for none.
    """
    with autocast(image.device.type, dtype):
        logits = network(image)
    (2**12 * logits.float().square().mean()).backward()
    network.zero_grad(set_to_none=True)


def make_step(
    network: torch.nn.Module,
    step: str,
    image: torch.Tensor,
    out_channels: int,
    dtype: torch.dtype | None = None,
    loss: str = "DiceLoss",
) -> Callable[[], None]:
    """
    A step as a user takes it: inference, or training with a loss and Adam, whose states are there from the start.

    Args:
        network: on the image's device.
        step: "inference" or "training".
        image: (B, C, D, H, W).
        out_channels: of the logits; the labels are drawn at random.
        dtype: of autocast; None for none.
        loss: class of monai.losses, such as "DiceCELoss".

    Returns:
        what takes the step and waits for its end.
    """
    if step == "training":
        label = torch.randint(0, out_channels, (image.shape[0], 1, *image.shape[2:]), device=image.device)
        loss_function = getattr(monai.losses, loss)(to_onehot_y=True, softmax=True)
        optimizer = torch.optim.Adam(network.parameters())
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # of zero length
        optimizer.zero_grad(set_to_none=True)

    def call() -> None:
        network.train(step == "training")
        if step == "training":
            with autocast(image.device.type, dtype):
                logits = network(image)
            loss_function(logits.float(), label).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        else:
            inference_step(network, image, dtype)
        synchronize(image.device)

    return call
