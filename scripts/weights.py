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

import os

import torch

__all__ = ["check_weights"]


def check_weights(checkpoint: str | os.PathLike, network: torch.nn.Module) -> None:
    """
    Make sure that a file's weights are there and fit a network, before anything is run with them.

    Args:
        checkpoint: file with a state dict, or with one under "model".
        network: the network that is to load it.

    Raises:
        FileNotFoundError: When the file does not exist.
        ValueError: When it holds no weights, or those of another network.
    """
    if not os.path.isfile(checkpoint):
        raise FileNotFoundError(
            f"There are no weights at {checkpoint}: train first, or give --ckpt_dir or --checkpoint where they lie."
        )
    try:
        weights = torch.load(checkpoint, map_location="cpu", weights_only=True)
        weights = weights.get("model", weights)
        then = {name: tuple(value.shape) for name, value in weights.items()}
    except Exception as error:
        raise ValueError(f"{checkpoint} holds no weights that can be read: {error}") from error
    now = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    for name in sorted(now.keys() | then.keys()):
        if now.get(name) != then.get(name):
            raise ValueError(
                f"{checkpoint} holds the weights of another network ({name}: {then.get(name, 'absent')} in the file, "
                f"{now.get(name, 'absent')} here): give the same channels, depths and other keys of the network, the "
                "same task overlay and data set as in training."
            )
