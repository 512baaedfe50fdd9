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

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from scripts.output import markdown_table

from .apart import run_apart
from .measuring import describe, machine, write_results

__all__ = ["WIDTHS", "memory", "step_bytes"]

WIDTHS: dict[str, dict[str, Any]] = {
    "compact": {"channels": [16, 32, 64, 128], "depths": [1, 1, 1, 1], "stage_conv": False, "full_resolution_skip": 16},
    "full": {"channels": [48, 96, 192, 384], "depths": [1, 1, 1, 1], "stage_conv": False, "full_resolution_skip": 16},
}
"""SegResMamba's widths: a third of the paper's and the paper's, both with a full-resolution path."""


def memory(
    sizes: Sequence[int] = (48, 64, 96, 128), classes: Sequence[int] = (2, 32), output_dir: str = "docs/benchmarks"
) -> None:
    """
    What a training step of SegResMamba (forward, DiceCELoss, backward, Adam; float32, on the CPU) takes: a fixed part,
    bytes a voxel of the batch, and bytes a voxel and class. The bytes are those between the two largest sizes of few
    and of many classes; the fixed part is such that no measured step needs more. :py:mod:`scripts.plan` chooses patches
    by it.

    Args:
        sizes: voxels an axis, rising; all but the largest for many classes.
        classes: few and many.
        output_dir: where ``memory.json`` and ``memory.md`` are written.

    Raises:
        RuntimeError: when a size could not be measured.
    """
    few, many = classes
    results: dict[str, Any] = {"machine": machine("cpu"), "widths": {}}
    for name, overrides in tqdm(WIDTHS.items(), desc="memory"):
        points = _measure(overrides, sizes, few) + _measure(overrides, sizes[:-1], many)
        mib = {(point["side"], point["classes"]): point["mib"] for point in points}
        slopes = {}
        for count, (small, large) in {few: sizes[-2:], many: sizes[-3:-1]}.items():
            slopes[count] = (mib[large, count] - mib[small, count]) * 2**20 / (large**3 - small**3)
        per_class = max(0.0, (slopes[many] - slopes[few]) / (many - few))
        line = {"bytes_per_voxel": round(slopes[few] - few * per_class), "bytes_per_voxel_and_class": round(per_class)}
        line["fixed_mib"] = 0
        line["fixed_mib"] = math.ceil(
            max(p["mib"] - step_bytes(line, p["side"] ** 3, p["classes"]) / 2**20 for p in points)
        )
        results["widths"][name] = {**line, "points": points}
    write_results(results, _markdown(results), "memory", output_dir)


def step_bytes(line: Mapping[str, Any], voxels: float, classes: int) -> float:
    """
    Args:
        line: of a width, in memory.json.
        voxels: of the batch.
        classes: channels of the output.

    Returns:
        what a training step takes, in bytes.
    """
    per_voxel = line["bytes_per_voxel"] + classes * line["bytes_per_voxel_and_class"]
    return line["fixed_mib"] * 2**20 + per_voxel * voxels


def _measure(overrides: Mapping[str, Any], sizes: Sequence[int], classes: int) -> list[dict[str, int]]:
    options = {"overrides": overrides, "out_channels": classes, "rounds": 0, "loss": "DiceCELoss"}
    points = []
    for found in run_apart("segresmamba_text", ["training"], spatial_sizes=[[side] * 3 for side in sizes], **options):
        if "error" in found:
            raise RuntimeError(f"{found.get('spatial_size')}, {classes} classes: {found['error']}")
        mib = found["peak_mib"] - found["base_mib"]
        points.append({"side": found["spatial_size"][0], "classes": classes, "mib": mib})
    return points


def _markdown(results: dict) -> str:
    lines = [f"Measured on {describe(results['machine'])}; float32, MiB beyond what the process held before.", ""]
    shapes = [(point["side"], point["classes"]) for point in next(iter(results["widths"].values()))["points"]]
    head = ["width", *(f"{side}^3, {classes} classes" for side, classes in shapes)]
    head += ["fixed part, MiB", "bytes a voxel", "bytes a voxel and class"]
    rows = []
    for name, width in results["widths"].items():
        cells = [name, *(f"{point['mib']:,}" for point in width["points"])]
        rows.append(
            cells + [f"{width[key]:,}" for key in ("fixed_mib", "bytes_per_voxel", "bytes_per_voxel_and_class")]
        )
    return "\n".join([*lines, markdown_table(head, rows)]) + "\n"
