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

from typing import Any

import numpy as np
from tqdm import tqdm

from .apart import run_apart
from .measuring import describe, machine, write_results

__all__ = ["WIDTHS", "memory"]

WIDTHS: dict[str, dict[str, Any]] = {
    "compact": {"channels": [16, 32, 64, 128], "depths": [1, 1, 1, 1], "stage_conv": False, "full_resolution_skip": 16},
    "full": {"channels": [48, 96, 192, 384], "depths": [1, 1, 1, 1], "stage_conv": False, "full_resolution_skip": 16},
}
"""SegResMamba's widths: the plain configs' and the paper's, both with a full-resolution path."""


def memory(sizes: tuple[int, ...] = (48, 64, 96, 128), output_dir: str = "docs/benchmarks") -> None:
    """
    What a training step of SegResMamba (forward, Dice loss, backward, Adam; float32, on the CPU) takes, as a line in
    the voxels of a batch: a fixed part and bytes a voxel, by least squares over cubes of growing size, raised so that
    no measured step needs more than the line says. :py:mod:`scripts.plan` chooses patches by it.

    Args:
        sizes: voxels an axis.
        output_dir: where ``memory.json`` and ``memory.md`` are written.

    Raises:
        RuntimeError: when a size could not be measured.
    """
    results: dict[str, Any] = {"machine": machine("cpu"), "widths": {}}
    for name, overrides in tqdm(WIDTHS.items(), desc="memory"):
        points = []
        shapes = [[side] * 3 for side in sizes]
        for found in run_apart("segresmamba_text", ["training"], spatial_sizes=shapes, overrides=overrides, rounds=0):
            if "error" in found:
                raise RuntimeError(f"{name}, {found.get('spatial_size')}: {found['error']}")
            points.append({"side": found["spatial_size"][0], "mib": found["peak_mib"] - found["base_mib"]})
        voxels = np.array([point["side"] ** 3 for point in points])
        taken = np.array([point["mib"] for point in points])
        slope, fixed = np.polyfit(voxels, taken, 1)
        fixed += max(0.0, float((taken - (fixed + slope * voxels)).max()))
        line = {"fixed_mib": round(float(fixed), 1), "bytes_per_voxel": round(float(slope) * 2**20, 1)}
        results["widths"][name] = {**line, "overrides": overrides, "points": points}
    write_results(results, _markdown(results), "memory", output_dir)


def _markdown(results: dict) -> str:
    sides = [point["side"] for point in next(iter(results["widths"].values()))["points"]]
    lines = [f"Measured on {describe(results['machine'])}; float32, MiB beyond what the process held before.", ""]
    lines.append(f"| width | {' | '.join(f'{side}^3' for side in sides)} | fixed part, MiB | bytes a voxel |")
    lines.append("| --- " * (len(sides) + 3) + "|")
    for name, width in results["widths"].items():
        cells = [name, *(f"{point['mib']:,}" for point in width["points"])]
        cells += [f"{width['fixed_mib']:,.0f}", f"{width['bytes_per_voxel']:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
