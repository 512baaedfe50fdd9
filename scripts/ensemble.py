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
from collections.abc import Sequence
from copy import deepcopy

import torch
from monai.utils import ensure_tuple

from scripts.output import whole_file
from scripts.weights import read_weights

__all__ = ["Ensemble", "join_weights"]


class Ensemble(torch.nn.Module):
    """
    Mean of the logits of several networks of one kind, as of a cross-validation's folds. As a network of its own, with
    one file of weights, it goes wherever a network goes: evaluation, inference, test-time flipping, other applications.
    (MONAI's ``EnsembleEvaluator`` is for networks that differ; it is an engine, and inference's alone.)

    Args:
        network: of the kind, copied.
        num_networks: number of networks, at least one.
    """

    def __init__(self, network: torch.nn.Module, num_networks: int) -> None:
        super().__init__()
        self.networks = torch.nn.ModuleList(deepcopy(network) for _ in range(num_networks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: volume (B, C, D, H, W).

        Returns:
            mean logits (B, classes, D, H, W).
        """
        output = self.networks[0](x)
        for network in self.networks[1:]:
            output = output + network(x)
        return output / len(self.networks)


def join_weights(checkpoints: Sequence[str | os.PathLike], output: str | os.PathLike) -> str | os.PathLike:
    """
    Write the weights of an :py:class:`Ensemble` from those of its networks, for configs/options/ensemble.yaml.

    Args:
        checkpoints: a file for each network; they have the same settings.
        output: file to write, whole or not at all.

    Returns:
        ``output``, so that a config may load what it writes.

    Raises:
        FileNotFoundError: When a file does not exist.
        ValueError: When one holds no weights.
    """
    joint = {
        f"networks.{k}.{name}": value
        for k, checkpoint in enumerate(ensure_tuple(checkpoints))
        for name, value in read_weights(checkpoint, "the file").items()
    }
    with whole_file(output) as unfinished:
        torch.save(joint, unfinished)
    return output


if __name__ == "__main__":
    from scripts.clear_errors import command

    command(join_weights)
