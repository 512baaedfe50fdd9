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

"""A picture of SegResMamba, drawn from the network that the configs build.

Usage::

    python -m scripts.network_picture --output docs/pictures/segresmamba.png
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from monai.bundle import ConfigParser
from monai.utils import ensure_tuple_rep
from torch import nn

from scripts.output import save_figure
from scripts.segresmamba import SegResMamba

__all__ = ["network_picture"]

_COLOURS = {"conv": "#DCE9F5", "mamba": "#FBE3C6", "skip": "#E9E9E9", "decoder": "#DDF0DF"}
_WIDTH, _HEIGHT = 3.4, 0.9


def network_picture(
    output: str,
    config_file: str | Sequence[str] = "configs/inference.json",
    patch_size: int | Sequence[int] | None = None,
) -> None:
    """
    Draw encoder, skips and decoder with the channels and sizes that each part gives for a patch.

    Args:
        output: the PNG.
        config_file: config, or a list of config and overlays, whose ``network_def`` is a SegResMamba.
        patch_size: voxels of the patch, one number for a cube; default: the config's.

    Raises:
        ValueError: When ``network_def`` is another network.
    """
    parser = ConfigParser(ConfigParser.load_config_files(config_file))
    parser["bundle_root"] = os.getcwd()
    network = parser.get_parsed_content("network_def")
    if not isinstance(network, SegResMamba):
        raise ValueError(f"{config_file}: network_def is a {type(network).__name__}, and only SegResMamba is drawn.")
    patch = ensure_tuple_rep(patch_size or parser.get_parsed_content("patch_size"), 3)
    save_figure(_draw(network, torch.zeros(1, network.in_channels, *patch)), Path(output))
    print(f"written: {output}")


def _shapes(network: SegResMamba, x: torch.Tensor) -> dict[str, str]:
    """What each part of the network gives, such as "32 x 20 x 28 x 20"."""
    found: dict[str, str] = {"input": _text(x)}
    parts = {name: part for name, part in network.named_modules() if name}
    hooks = [
        part.register_forward_hook(lambda _, __, made, name=name: found.__setitem__(name, _text(made)))
        for name, part in parts.items()
    ]
    with torch.no_grad():
        network.eval()(x)
    for hook in hooks:
        hook.remove()
    return found


def _text(x: torch.Tensor) -> str:
    return f"{x.shape[1]} × " + " × ".join(map(str, x.shape[2:]))


def _draw(network: SegResMamba, x: torch.Tensor) -> Figure:
    shapes = _shapes(network, x)
    levels = len(network.blocks)
    figure = Figure(figsize=(11, 1 + 1.45 * (levels + 1)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_axis_off()
    left, middle, right = 0.0, 5.2, 10.4

    def row(level: int) -> float:  # the levels go down; row -1 is the input's resolution
        return -1.75 * level

    _box(axes, left, row(-1), "image", shapes["input"], "skip")
    stride = " × ".join(map(str, network.stem.stride))
    for level, block in enumerate(network.blocks):
        tom = sum(isinstance(part, nn.Module) and type(part).__name__ == "ToM" for part in block.modules())
        what = f"convolutions and {tom} Mamba layers" if tom else "convolutions"
        if level == 0:
            what = f"stem 7³, stride {stride}\n{what}"
        else:
            what = f"downsampling ½\n{what}"
        _box(axes, left, row(level), what, shapes[f"blocks.{level}"], "mamba" if tom else "conv")
        _arrow(axes, (left, row(level - 1) - _HEIGHT / 2), (left, row(level) + _HEIGHT / 2))
        _box(axes, middle, row(level), "norm, MLP", shapes[f"skips.{level}"], "skip")
        _arrow(axes, (left + _WIDTH / 2, row(level)), (middle - _WIDTH / 2, row(level)))
    for index in range(levels - 1):
        level = levels - 2 - index
        what = "upsampling ×2, sum\nresidual block"
        _box(axes, right, row(level), what, shapes[f"up_stages.{index}"], "decoder")
        _arrow(axes, (middle + _WIDTH / 2, row(level)), (right - _WIDTH / 2, row(level)))
        if index:
            _arrow(axes, (right, row(level + 1) + _HEIGHT / 2), (right, row(level) - _HEIGHT / 2))
    _arrow(axes, (middle + _WIDTH / 2, row(levels - 1)), (right, row(levels - 2) - _HEIGHT / 2))
    head = shapes["head"]
    if network.full_resolution is not None:
        _box(axes, middle, row(-1), "convolution, residual block", shapes["full_resolution"], "conv")
        _arrow(axes, (left + _WIDTH / 2, row(-1)), (middle - _WIDTH / 2, row(-1)))
        _arrow(axes, (middle + _WIDTH / 2, row(-1)), (right - _WIDTH / 2, row(-1)))
        _box(axes, right, row(-1), "upsampling, sum\nresidual block, convolution 1³", head, "decoder")
    else:
        _box(axes, right, row(-1), f"transposed convolution, stride {stride}", head, "decoder")
    _arrow(axes, (right, row(0) + _HEIGHT / 2), (right, row(-1) - _HEIGHT / 2))
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    axes.set_title(f"SegResMamba, {millions:.2f} million parameters (channels × voxels)", loc="left", weight="bold")
    axes.set_xlim(left - _WIDTH / 2 - 0.2, right + _WIDTH / 2 + 0.2)
    axes.set_ylim(row(levels - 1) - _HEIGHT, row(-1) + _HEIGHT)
    return figure


def _box(axes: Axes, x: float, y: float, what: str, shape: str, kind: str) -> None:
    corner = (x - _WIDTH / 2, y - _HEIGHT / 2)
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(
        FancyBboxPatch(corner, _WIDTH, _HEIGHT, boxstyle=style, facecolor=_COLOURS[kind], edgecolor="#555555")
    )
    axes.text(x, y + 0.13, what, ha="center", va="center", fontsize=9.5, linespacing=1.25)
    axes.text(x, y - 0.31, shape, ha="center", va="center", fontsize=8.5, color="#444444", family="monospace")


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color="#555555", shrinkA=1, shrinkB=1)
    )


if __name__ == "__main__":
    from scripts.clear_errors import command

    command(network_picture)
