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

"""What a network costs: the multiply-accumulates the papers counted, those they did not see, and its parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from scripts.segresmamba import InstanceNorm, SegResMamba
from scripts.tri_orientated_mamba import ToM

__all__ = ["dead_parameters", "flops", "paper_macs", "parameter_counts", "tom_macs"]


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


def _skeleton(network: nn.Module) -> nn.Module:
    """A copy that has shapes and no values, so that it runs at any size at once, with a stand-in for each ToM."""
    skeleton = copy.deepcopy(network).to("meta").eval()
    if isinstance(skeleton, ToM):
        return _CountedToM(skeleton)
    for parent in list(skeleton.modules()):
        for name, child in parent.named_children():
            if isinstance(child, ToM):
                setattr(parent, name, _CountedToM(child))
    return skeleton


def _volume(in_channels: int, spatial_size: int | Sequence[int]) -> torch.Tensor:
    size = (spatial_size,) * 3 if isinstance(spatial_size, int) else tuple(spatial_size)
    return torch.empty(1, in_channels, *size, device="meta")


def paper_macs(network: nn.Module, in_channels: int, spatial_size: int | Sequence[int]) -> float:
    """
    Multiply-accumulates of one volume by the rules of ``thop``, which is how the figures of the SegResMamba paper come
    about (Tables 1, 2 and 3): layers that are modules, so no attention's products of matrices; transposed convolutions
    at their output's positions, a factor of ``stride ** 3`` too many; two operations an element of a norm, four where
    it has weights. Of a ToM it counts the LayerNorm alone, since the paper's Mamba called its projections and scans as
    functions, out of the counter's sight; :py:func:`tom_macs` has the rest.

    Each layer is counted once. ``thop`` itself counts a layer anew for each path that leads to it, which doubles
    MONAI's DynUNet.

    Args:
        network: any network on volumes; it is copied, neither run nor changed.
        in_channels: channels of the volume.
        spatial_size: the volume's size (D, H, W), or one number for a cube.

    Raises:
        ModuleNotFoundError: when ``thop`` is not installed.
    """
    try:
        from thop.profile import register_hooks
        from thop.vision.basic_hooks import count_normalization, zero_ops
    except ImportError as error:
        raise ModuleNotFoundError(
            f"counting needs thop, a development tool: pip install thop (with setuptools for its distutils): {error}"
        ) from error
    # A subclass has no rule of its own; and thop, which counts no trilinear upsampling, logs a warning for each.
    rules = {**register_hooks, InstanceNorm: count_normalization, nn.Upsample: zero_ops}
    skeleton = _skeleton(network)
    counted = {module: torch.zeros(1, dtype=torch.float64) for module in skeleton.modules() if type(module) in rules}
    for module, total in counted.items():
        module.register_buffer("total_ops", total)  # where the rules add to, in place
        module.register_forward_hook(rules[type(module)])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # thop's rules warn of their own helpers
        skeleton(_volume(in_channels, spatial_size))
    return sum(float(total) for total in counted.values())


def tom_macs(network: nn.Module, in_channels: int, spatial_size: int | Sequence[int]) -> dict[str, int]:
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
        network: any network on volumes; it is copied, neither run nor changed.
        in_channels: channels of the volume.
        spatial_size: the volume's size (D, H, W), or one number for a cube.

    Returns:
        numbers by the names above; all zero for a network without ToM.
    """
    skeleton = _skeleton(network)
    with torch.no_grad():
        skeleton(_volume(in_channels, spatial_size))
    return _tom_macs(skeleton)


def _tom_macs(skeleton: nn.Module) -> dict[str, int]:
    total = dict.fromkeys(("projections", "convolutions", "scans", "exponentials"), 0)
    for module in skeleton.modules():
        if isinstance(module, _CountedToM):
            for name, count in module.per_voxel.items():
                total[name] += module.voxels * count
    return total


def flops(network: nn.Module, in_channels: int, spatial_size: int | Sequence[int]) -> dict[str, int]:
    """
    Floating point operations of one volume, two for a multiply-accumulate.

    Args:
        network: any network on volumes; it is copied, neither run nor changed.
        in_channels: channels of the volume.
        spatial_size: the volume's size (D, H, W), or one number for a cube.

    Returns:
        ``"convolutions and products"``: convolutions, transposed ones at their input's positions, linear layers and
        attention, as PyTorch's ``FlopCounterMode`` counts them; ``"tom"``: twice :py:func:`tom_macs`, and one for each
        exponential; ``"all"``, their sum. Norms, activations, pooling and interpolation are not counted.
    """
    skeleton = _skeleton(network)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        skeleton(_volume(in_channels, spatial_size))
    tom = _tom_macs(skeleton)
    exponentials = tom.pop("exponentials")
    counts = {"convolutions and products": counter.get_total_flops(), "tom": 2 * sum(tom.values()) + exponentials}
    return {**counts, "all": sum(counts.values())}


def parameter_counts(network: nn.Module) -> dict[str, int]:
    """
    Trainable parameters.

    Args:
        network: any network; it is not run.

    Returns:
        ``"all"``, and ``"tom"``, those of its ToM layers.
    """

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    return {"all": count(network), "tom": sum(count(m) for m in network.modules() if isinstance(m, ToM))}


def dead_parameters(network: nn.Module, in_channels: int, spatial_size: int | Sequence[int]) -> list[str]:
    """
    Parameters that the output does not depend on: no gradient reaches them, so they are only stored. The paper's
    SegResMamba has 39.58 M of them, an encoder that is made and not run; here every network should have none.

    A ToM counts as a whole: it is live where a gradient reaches its LayerNorm, since each of its parameters then gets
    one.

    Args:
        network: any network on volumes; it is copied, neither run nor changed.
        in_channels: channels of the volume.
        spatial_size: the volume's size (D, H, W), or one number for a cube.

    Returns:
        their names.
    """
    toms = [name for name, module in network.named_modules() if isinstance(module, ToM)]
    skeleton = _skeleton(network)
    output = skeleton(_volume(in_channels, spatial_size))
    outputs = output if isinstance(output, list | tuple) else [output]
    sum(o.sum() for o in outputs).backward()
    with_gradient = {name for name, p in skeleton.named_parameters() if p.grad is not None}
    with_gradient |= {f"{tom}." for tom in toms if f"{tom}.norm.weight" in with_gradient}
    return [
        name
        for name, p in network.named_parameters()
        if p.requires_grad
        and not any(name == live or (live[-1] == "." and name.startswith(live)) for live in with_gradient)
    ]


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
        counted = paper_macs(network, in_channels, spatial_size)
        tom = tom_macs(network, in_channels, spatial_size)
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
    from scripts.clear_errors import command

    command(_main)
