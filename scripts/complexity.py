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

"""What a network of this bundle costs: the multiply-accumulates the paper counted, and those it did not see."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn

from scripts.segresmamba import InstanceNorm, SegResMamba
from scripts.tri_orientated_mamba import ToM

__all__ = ["paper_macs", "parameter_counts", "tom_macs"]


class _CountedToM(nn.Module):
    """
    Stands for a ToM while a network is counted: its LayerNorm alone, which is what the counter saw of the paper's, and
    the number of voxels that it is asked for.
    """

    def __init__(self, tom: ToM) -> None:
        super().__init__()
        self.norm = tom.norm
        orders, d, taps = tom.conv_weight.shape
        dt_rank, d_state = tom.dt_proj_weight.shape[2], tom.A_log.shape[2]
        self.voxels = 0
        self.per_voxel = {
            "projections": 3 * tom.norm.normalized_shape[0] * d + orders * (d * (dt_rank + 2 * d_state) + dt_rank * d),
            "convolutions": orders * taps * d,
            "scans": orders * (4 * d * d_state + 2 * d) + d,
            "exponentials": orders * d * d_state,
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.voxels += x.shape[0] * x.shape[2:].numel()
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


def _skeleton(network: SegResMamba) -> nn.Module:
    """A copy that has shapes and no values, so that it runs at any size at once, with a stand-in for each ToM."""
    skeleton = copy.deepcopy(network).to("meta").eval()
    for parent in list(skeleton.modules()):
        for name, child in parent.named_children():
            if isinstance(child, ToM):
                setattr(parent, name, _CountedToM(child))
    return skeleton


def _volume(network: SegResMamba, spatial_size: int | Sequence[int]) -> torch.Tensor:
    size = (spatial_size,) * 3 if isinstance(spatial_size, int) else tuple(spatial_size)
    return torch.empty(1, network.in_channels, *size, device="meta")


def paper_macs(network: SegResMamba, spatial_size: int | Sequence[int]) -> float:
    """
    Multiply-accumulates of one volume as ``thop`` counts them, which is how the figures of the SegResMamba paper come
    about (Tables 1, 2, 3 and 7): convolutions, transposed ones at their output's positions, two operations an element
    of an InstanceNorm and four of a LayerNorm. Of a ToM it counts the LayerNorm alone, since the paper's Mamba called
    its projections and scans as functions, out of the counter's sight; :py:func:`tom_macs` has the rest.

    Args:
        network: a :py:class:`SegResMamba`; it is copied, neither run nor changed.
        spatial_size: the volume's size (D, H, W), or one number for a cube.

    Raises:
        ModuleNotFoundError: when ``thop`` is not installed.
    """
    try:
        import thop
        from thop.vision.basic_hooks import count_normalization, zero_ops
    except ImportError as error:
        raise ModuleNotFoundError(
            f"counting needs thop, a development tool: pip install thop (with setuptools for its distutils): {error}"
        ) from error
    # A subclass has no rule of its own; and thop, which counts no trilinear upsampling, logs a warning for each.
    rules = {InstanceNorm: count_normalization, nn.Upsample: zero_ops}
    skeleton = _skeleton(network)
    return thop.profile(skeleton, (_volume(network, spatial_size),), custom_ops=rules, verbose=False)[0]


def tom_macs(network: SegResMamba, spatial_size: int | Sequence[int]) -> dict[str, int]:
    """
    What all ToM layers together cost for one volume, which :py:func:`paper_macs` leaves out.

    For one voxel of a level with C channels, inner width ``d = expand * C``, state size n, rank R of the step sizes and
    K orders, in multiply-accumulates:

    - projections: ``in_proj`` 2 C d and ``out_proj`` d C; for each order ``x_proj`` d (R + 2 n) and ``dt_proj`` R d;
    - convolutions: for each order ``taps * d``;
    - scans: for each order 4 d n (``delta A``, ``exp(delta A) h``, ``+ (delta u) B``, ``+ C h``) and 2 d (``delta u``,
      ``+ D u``); once for all orders d (the gate);
    - exponentials: d n for each order, ``exp(delta A)``. Not multiply-accumulates, so given apart.

    LayerNorm, SiLU, softplus and the sum over orders are not counted.

    Args:
        network: a :py:class:`SegResMamba`; it is copied, neither run nor changed.
        spatial_size: the volume's size (D, H, W), or one number for a cube.

    Returns:
        numbers by the names above; all zero for a network without ToM.
    """
    skeleton = _skeleton(network)
    with torch.no_grad():
        skeleton(_volume(network, spatial_size))
    total = dict.fromkeys(("projections", "convolutions", "scans", "exponentials"), 0)
    for module in skeleton.modules():
        if isinstance(module, _CountedToM):
            for name, count in module.per_voxel.items():
                total[name] += module.voxels * count
    return total


def parameter_counts(network: nn.Module) -> dict[str, int]:
    """
    Trainable parameters: ``"all"``, and ``"tom"``, those of its ToM layers. All are live: each takes part in the
    output, so the paper's unused encoder (39.58 M) has no counterpart here.
    """

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    return {"all": count(network), "tom": sum(count(m) for m in network.modules() if isinstance(m, ToM))}


def _main(
    spatial_size: int | Sequence[int] = 128, in_channels: int = 1, out_channels: int = 14, **options: Any
) -> None:
    """Print what a SegResMamba costs.

    Args:
        spatial_size: the volume's size, 128 or 48,192,192.
        in_channels: channels of the input.
        out_channels: channels of the output.
        options: further arguments of SegResMamba, such as --depths 1,1,1,1 --stage_conv False.
    """
    try:
        with torch.device("meta"):
            network = SegResMamba(3, in_channels, out_channels, **options)
        counted, tom = paper_macs(network, spatial_size), tom_macs(network, spatial_size)
    except (TypeError, ValueError, ModuleNotFoundError) as error:
        raise SystemExit(f"Error: {error}") from error
    parameters = parameter_counts(network)
    exponentials = tom.pop("exponentials")
    rows = [
        ("parameters, all live", parameters["all"] / 1e6, "M"),
        ("  of them in ToM", parameters["tom"] / 1e6, "M"),
        ("MACs, counted as the paper's", counted / 1e9, "G"),
        *((f"MACs of ToM beside it: {name}", count / 1e9, "G") for name, count in tom.items()),
        ("MACs, all", (counted + sum(tom.values())) / 1e9, "G"),
        ("exponentials of ToM's scans", exponentials / 1e9, "G"),
    ]
    for name, value, unit in rows:
        print(f"{name:<38}{value:>10.2f} {unit}")


if __name__ == "__main__":
    import fire

    fire.Fire(_main)
