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

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

__all__ = ["build_network", "first_cause", "network_names"]

_CONFIGS = Path(__file__).parents[2] / "configs"


def network_names() -> list[str]:
    """The overlays in configs/networks, by name."""
    return sorted(path.stem for path in (_CONFIGS / "networks").glob("*.yaml"))


def first_cause(error: BaseException) -> str:
    """
    Args:
        error: what MONAI's config parser, a network or Triton raised.

    Returns:
        the first line of what was raised at first; the last one where the first is but a place in the source.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1 if lines[0].endswith(":") else 0]  # Triton begins "at 45:8:"


def build_network(
    name: str,
    in_channels: int,
    out_channels: int,
    spatial_size: Sequence[int],
    device: str | torch.device = "cpu",
    overrides: Mapping[str, Any] | None = None,
) -> torch.nn.Module:
    """
    The network that a training with an overlay of configs/networks would have.

    Args:
        name: of the overlay, without its suffix.
        in_channels: channels of the input.
        out_channels: channels of the output.
        spatial_size: patch size (D, H, W).
        device: where it is made; ``"meta"`` for shapes alone.
        overrides: further keys of the configs, such as ``channels_last``.

    Raises:
        ValueError: when there is no such overlay.
    """
    if name not in network_names():
        raise ValueError(f"there is no configs/networks/{name}.yaml; there are: {', '.join(network_names())}.")
    files = [_CONFIGS / "train.json", _CONFIGS / "networks" / f"{name}.yaml"]
    parser = ConfigParser(ConfigParser.load_config_files([str(file) for file in files]))
    parser.update({"bundle_root": str(_CONFIGS.parent), "in_channels": in_channels, "num_classes": out_channels})
    parser.update({"patch_size": list(spatial_size), **(overrides or {})})
    try:
        with torch.device(device):
            network = parser.get_parsed_content("network_def")
    except RuntimeError:  # SwinUNETR reads values of tensors while it is made, which have none on "meta"
        if torch.device(device).type != "meta":
            raise
        parser.parse(reset=True)
        network = parser.get_parsed_content("network_def").to(device)
    return network.to(memory_format=parser.get_parsed_content("memory_format"))
