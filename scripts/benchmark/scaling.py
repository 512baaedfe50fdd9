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

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from scripts.clear_errors import listed
from scripts.output import markdown_table, new_figure, save_figure

from .apart import run_apart
from .measuring import describe, file_name, free_gb, machine, pick_device, write_results
from .networks import network_names
from .steps import DTYPES

__all__ = ["exponent", "scaling"]


def scaling(
    networks: str | Sequence[str] = "segresmamba_tables,segresmamba_text,segmamba,unet,unetr,swin_unetr,segresnet",
    sizes: Sequence[int] = (32, 48, 64, 96, 128, 160, 192),
    steps: str | Sequence[str] = "inference,training",
    rounds: int = 3,
    seconds: float = 20.0,
    in_channels: int = 1,
    out_channels: int = 2,
    device: str = "",
    precision: str = "",
    memory_gb: float = 0.0,
    output_dir: str = "docs/benchmarks",
    name: str = "",
) -> None:
    """
    How time and peak memory of networks grow with the volume: cubes of growing size, batch 1, up to the first that
    does not fit or takes too long, each network in processes of its own. Fits time ~ voxels ** exponent, to all sizes
    and to the largest two: what a volume costs whatever its size, as the optimizer's step, makes the first smaller; and
    likewise the peak memory, less what the process held before the network was made. Other networks' curves from an
    earlier run on the same machine, with the same versions and rounds, stay in the files.

    Args:
        networks: names of overlays in configs/networks, with commas between them, or "all".
        sizes: voxels an axis; one that a network does not take is left out of its curve.
        steps: of "inference" and "training" (forward, Dice loss, backward, Adam).
        rounds: timed runs at each size, after one that is not timed.
        seconds: no larger size is tried after one that took longer.
        in_channels: channels of the input.
        out_channels: channels of the output.
        device: "cpu" or "cuda"; default: "cuda" where there is one.
        precision: "fp32", "bf16" or "fp16" by autocast; default: "fp16" on CUDA, "fp32" elsewhere.
        memory_gb: sizes that need more GB of host memory do not fit (Linux); default: 90 % of what is free.
        output_dir: where ``scaling-<name>.json``, ``.md`` and ``.png`` are written.
        name: of the machine in the files' names; default: its processor's or GPU's.

    Raises:
        ValueError: when a network, a step, the device or the precision is unknown.
    """
    names, wanted = listed(networks), listed(steps)
    names = network_names() if names == ["all"] else names
    unknown = [x for x in names if x not in network_names()] + [x for x in wanted if x not in ("inference", "training")]
    if unknown:
        raise ValueError(f"unknown: {', '.join(unknown)}. Networks are: {', '.join(network_names())}.")
    device = pick_device(device)
    precision = precision or ("fp16" if device.startswith("cuda") else "fp32")
    sides = sorted([sizes] if isinstance(sizes, int) else sizes)
    if rounds < 1 or precision not in DTYPES:
        raise ValueError(
            f"rounds must be at least 1 and precision one of {', '.join(DTYPES)}: {rounds}, {precision!r}."
        )
    options: dict[str, Any] = {"in_channels": in_channels, "out_channels": out_channels, "rounds": rounds}
    options |= {"device": device, "precision": precision, "seconds": seconds, "memory_gb": memory_gb or free_gb()}
    results: dict[str, Any] = {"machine": machine(device), "precision": precision, "rounds": rounds, "curves": []}
    stem = f"scaling-{name or file_name(str(results['machine']['name']))}"
    earlier = Path(output_dir) / f"{stem}.json"
    if earlier.is_file():
        before = json.loads(earlier.read_text())
        if all(before.get(key) == results[key] for key in ("machine", "precision", "rounds")):
            results["curves"] = [c for c in before["curves"] if c["network"] not in names or c["step"] not in wanted]
    for network, step in tqdm([(n, s) for n in names for s in wanted], desc="scaling"):
        points: list[dict[str, Any]] = []
        end, left = "", sides
        while left:
            for found in run_apart(network, [step], spatial_sizes=[[side] * 3 for side in left], **options):
                if "error" in found:
                    at = found.get("spatial_size", [left[0]])[0]
                    end = f"{at}^3 {found['error']}"
                    left = [side for side in left if side > at]
                    break
                point = {key: found[key] for key in ("seconds", "base_mib", "peak_mib")}
                points.append({"side": found["spatial_size"][0], **point})
            else:
                break
            if "does not take this size" not in end:  # a larger one may be taken
                break
        curve = {"network": network, "step": step, "points": points, "end": end}
        if len(points) > 2:
            pairs = [(p["side"] ** 3, p["seconds"]) for p in points]
            curve |= {"exponent": exponent(pairs), "last_exponent": exponent(pairs[-2:])}
            memory = [(p["side"] ** 3, p["peak_mib"] - points[0]["base_mib"]) for p in points]
            curve["memory_exponent"] = exponent([pair for pair in memory if pair[1] > 0])
        results["curves"].append(curve)
        write_results(results, _markdown(results), stem, output_dir)  # what is done is kept
        _draw(results, Path(output_dir) / f"{stem}.png")


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """
    Slope of the straight line that comes nearest to points on logarithmic axes.

    Args:
        points: pairs of positive numbers.
    """
    x, y = np.log(np.array(points, dtype=float)).T
    return float(np.polyfit(x, y, 1)[0])


def _markdown(results: dict) -> str:
    lines = [f"Measured on {describe(results['machine'])}; {results['precision']}, batch 1. Median s, peak MiB.", ""]
    sides = sorted({p["side"] for curve in results["curves"] for p in curve["points"]})
    head = ["network", "step", *(f"{side}^3" for side in sides)]
    head += ["exponent of time in voxels", "of the last two", "of memory", "ends"]
    rows = []
    for curve in sorted(results["curves"], key=lambda c: c["network"]):
        at = {p["side"]: f"{p['seconds']:.3f}, {p['peak_mib']:,}" for p in curve["points"]}
        cells = [curve["network"], curve["step"], *(at.get(side, "") for side in sides)]
        cells += [
            f"{curve[key]:.2f}" if key in curve else "" for key in ("exponent", "last_exponent", "memory_exponent")
        ]
        rows.append([*cells, curve["end"]])
    return "\n".join([*lines, markdown_table(head, rows)]) + "\n"


def _draw(results: dict, path: Path) -> None:
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    steps = list(dict.fromkeys(curve["step"] for curve in results["curves"]))
    curves = sorted(results["curves"], key=lambda curve: curve["network"])
    colors = {name: f"C{k % 10}" for k, name in enumerate(dict.fromkeys(curve["network"] for curve in curves))}
    figure, axes = new_figure(len(steps), 2)
    for row, step in enumerate(steps):
        for column, (key, label) in enumerate((("seconds", "s"), ("peak_mib", "peak memory, MiB"))):
            axis = axes[row][column]
            for curve in curves:
                if curve["step"] == step and curve["points"]:
                    text = curve["network"]
                    if key == "seconds" and "exponent" in curve:
                        text += f" ({curve['exponent']:.2f})"
                    values = [(p["side"], p[key]) for p in curve["points"]]
                    axis.plot(*zip(*values), color=colors[curve["network"]], marker="o", markersize=4, label=text)
            axis.set(xscale="log", yscale="log", xlabel="voxels an axis", ylabel=f"{step}, {label}")
            sides = sorted({p["side"] for curve in results["curves"] for p in curve["points"]})
            axis.set_xticks(sides, [str(side) for side in sides])
            axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7, title="exponent in voxels" if key == "seconds" else None, title_fontsize=7)
    save_figure(figure, path)
