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
"""A task overlay for one's own data set, planned from its statistics."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from monai.apps.auto3dseg import DataAnalyzer
from monai.transforms import LoadImage, Orientation, generate_spatial_bounding_box

from scripts.benchmark.measuring import free_gb
from scripts.benchmark.memory import WIDTHS, step_bytes
from scripts.data_check import check_dataset
from scripts.datalist import case_groups, dataset_channels, dataset_classes, load_datalist
from scripts.output import write_text

__all__ = ["Statistics", "analyze", "plan", "task_overlay"]

_MEMORY = Path(__file__).parents[1] / "docs" / "benchmarks" / "memory.json"
_STEPS = 25000  # of the paper's trainings on BTCV and Spleen
_COARSE = 1.5  # an axis this much coarser than the finest keeps its resolution at the stem
_LEAST = 16  # voxels an axis of a patch
_MULTIPLE = 8  # voxels; SegResMamba needs none, but odd sizes on the way down are padded
_MR = re.compile(r"\b(mri?|t[12]\w*|flair|pd|dwi|adc)\b", re.IGNORECASE)  # what channels of MR images are called
_SIDE = re.compile(r"(?<![a-z0-9])(left|right|lt|rt|l|r|lh|rh)(?![a-z0-9])", re.IGNORECASE)
_USUAL = 96**3  # voxels of a patch as the paper's


@dataclass(frozen=True)
class Statistics:
    """
    What a plan is made from; axes in RAS orientation.

    Args:
        class_names: background first.
        channels: what dataset.json calls each channel of the images, such as "CT" or "T1".
        cases: number of labelled cases.
        groups: number of groups of them, such as the images of one patient, which no split parts.
        spacing: voxel sizes in mm of each case, shape (cases, 3).
        shape: voxels of each case, shape (cases, 3).
        cropped_shape: voxels of the box around its intensities above 0, of CT those of the image, shape (cases, 3).
        zeros: share of the voxels that are exactly 0 in all channels, mean of the cases; of CT 0.
        intensity: mean over the cases with foreground of the 0.5 and the 99.5 percentile of its intensities, by
            channel.
        described: what dataset.json says of the data set: "name", "reference", "licence" or "license".
    """

    class_names: Sequence[str]
    channels: Sequence[str]
    cases: int
    groups: int
    spacing: np.ndarray
    shape: np.ndarray
    cropped_shape: np.ndarray
    zeros: float
    intensity: Sequence[tuple[float, float]]
    described: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_ct(self) -> bool:
        """Intensities are Hounsfield units."""
        return _is_ct(self.channels)

    @property
    def filled(self) -> float:
        """Share of the images that the boxes take."""
        return float(np.mean(self.cropped_shape.prod(1) / self.shape.prod(1)))

    @property
    def is_zero_outside(self) -> bool:
        """
        The images are 0 around their object; nnU-Net's rule, a quarter of the voxels or more. Outside the boxes of an
        image that was normalised as a whole its background is below 0 instead.
        """
        return not self.is_ct and self.filled < 0.75 and self.zeros >= 0.9 * (1 - self.filled)


def analyze(dataset_dir: str | os.PathLike) -> Statistics:
    """
    Read all labelled cases of a data set with MONAI's ``DataAnalyzer``.

    Args:
        dataset_dir: folder in the Decathlon's layout.

    Returns:
        its statistics.

    Raises:
        FileNotFoundError: When the folder or a file does not exist.
        ValueError: When dataset.json is malformed, an image does not fit its label, a label has unknown values, or
            ``DataAnalyzer`` cannot make sense of a case.
    """
    cases = load_datalist(dataset_dir, "all")
    classes = dataset_classes(dataset_dir)
    check_dataset(cases, len(classes), dataset_channels(dataset_dir))
    analyzer = DataAnalyzer(
        {"training": cases}, "", output_path="", do_ccp=False, device="cpu", worker=0, label_key="label"
    )
    found = analyzer.get_all_case_stats()
    if len(found["stats_by_cases"]) < len(cases):
        missed = len(cases) - len(found["stats_by_cases"])
        raise ValueError(f"{dataset_dir}: MONAI's DataAnalyzer could not process {missed} cases; its log names them.")
    images = [case["image_stats"] for case in found["stats_by_cases"]]
    content = json.loads((Path(str(dataset_dir)).expanduser() / "dataset.json").read_text(encoding="utf-8"))
    modality = content.get("modality", content.get("channel_names"))
    channels = [str(name) for name in (modality.values() if isinstance(modality, dict) else modality)]
    boxes = [([*shape], 0.0) for shape in (image["shape"][0] for image in images)]
    if not _is_ct(channels):
        boxes = [_box(case["image"]) for case in cases]
    labelled = [case for case in found["stats_by_cases"] if len(case["label_stats"]["labels"]) > 1]  # not all 0
    foreground = [case["image_foreground_stats"]["intensity"] for case in labelled or found["stats_by_cases"]]
    return Statistics(
        class_names=list(classes.values()),
        channels=channels,
        cases=len(cases),
        groups=len(set(case_groups(cases))),
        spacing=np.array([image["spacing"] for image in images], dtype=float).reshape(-1, 3),
        shape=np.array([image["shape"][0] for image in images]),
        cropped_shape=np.array([box for box, _ in boxes]),
        zeros=float(np.mean([zeros for _, zeros in boxes])),
        intensity=[
            (_mean(foreground, k, "percentile_00_5"), _mean(foreground, k, "percentile_99_5"))
            for k in range(len(foreground[0]))
        ],
        described={key: str(content[key]) for key in ("name", "reference", "licence", "license") if content.get(key)},
    )


def _is_ct(channels: Sequence[str]) -> bool:
    return all(name.strip().upper() == "CT" for name in channels)


def _box(files: str | Sequence[str]) -> tuple[list[int], float]:
    """Voxels of the box around what is above 0, whose first axis the analyzer leaves whole, and the share of zeros."""
    image = Orientation("RAS")(LoadImage(image_only=True, ensure_channel_first=True)(files))
    start, end = generate_spatial_bounding_box(image, allow_smaller=True)
    return [max(1, b - a) for a, b in zip(start, end)], float((image == 0).all(0).float().mean())


def _mean(cases: Sequence[Sequence[dict[str, float]]], channel: int, key: str) -> float:
    return float(np.mean([case[channel][key] for case in cases]))


def task_overlay(found: Statistics, dataset_dir: str | os.PathLike, memory_gb: float) -> str:
    """
    Choose classes, intensities, spacing, width, patch, batch and length of a training.

    Args:
        found: the data set's statistics.
        dataset_dir: its folder, written into the overlay.
        memory_gb: what a training step may take, in GB (10^9 bytes).

    Returns:
        a task overlay in YAML, with a comment on each choice.

    Raises:
        ValueError: When there are fewer than two cases or groups of them, or the memory is too small for any patch.
    """
    if found.groups < 2:
        what = "labelled case" if found.cases < 2 else "group of labelled cases"
        raise ValueError(f"{dataset_dir} has one {what}: a training needs another to validate on.")
    spacing = _spacing(found.spacing)
    shape = found.cropped_shape if found.is_zero_outside else found.shape
    median = np.round(np.median(shape * found.spacing, axis=0) / spacing)
    finest = spacing.min()
    stem = [1 if step >= _COARSE * finest else 2 for step in spacing]
    num_folds = min(5, found.groups)
    width, patch, batch, need = _patch(median, spacing, stem, found, memory_gb)
    steps = math.ceil(found.cases * (num_folds - 1) // num_folds / batch)  # an epoch with one fold held out
    epochs = math.ceil(_STEPS / steps)
    interval = max(1, epochs // 50)
    lines = [
        f"# Planned by scripts.plan from {found.cases} cases for {memory_gb:g} GB. Each choice may be changed.",
        f"dataset_dir: {json.dumps(str(Path(str(dataset_dir)).expanduser().resolve()))}",
        f"num_folds: {num_folds}  # five, or one for each case or group; fold 0 is held out to validate on",
        f"class_names: {json.dumps(list(found.class_names))}  # of dataset.json, here for images without one",
        f"in_channels: {len(found.channels)}  # {', '.join(found.channels)}",
        *_intensity_lines(found),
        f"spacing: {_list(spacing)}  # mm, {_spacing_reason(found.spacing)}",
        f"stem_stride: {stem}  # {_stem_reason(stem)}",
        *_rotation_lines(stem),
        *_mirror_lines(found.class_names),
        f"# SegResMamba's {width} width: full where it leaves room for half the median image or 96 x 96 x 96 voxels.",
        *(f"{key}: {json.dumps(value)}" for key, value in WIDTHS[width].items()),
        "learning_rate: 0.001  # top of the one cycle, AdamW; the compact hippocampus network bears 0.003",
        f"patch_size: {patch}  # voxels; the median image{_cropped(found)} has {_list(median)} at this spacing",
        f"batch_size: {batch}  # a step takes about {need:.1f} GB by docs/benchmarks/memory.json (float32, CPU)",
        f"max_epochs: {epochs}  # {_STEPS:,} steps with one fold held out, as many as the paper's on BTCV",
        f"val_interval: {interval}  # epochs, some 50 validations",
        f"save_interval: {interval}  # epochs, a checkpoint to go on from beside each validation",
        f"cache_rate: {_cache_rate(found, spacing)}  # share of the images that half of the memory now free here holds",
        *_meta_lines(found, Path(str(dataset_dir)).expanduser().resolve().name),
    ]
    return "\n".join(lines) + "\n"


def plan(dataset_dir: str, output: str, memory_gb: float = 8.0) -> None:
    """
    Read a data set in the Decathlon's layout and write a task overlay for it, with a comment on each choice.

    Args:
        dataset_dir: folder with dataset.json, imagesTr and labelsTr.
        output: the overlay, such as configs/tasks/mine.yaml.
        memory_gb: memory that a training step may take, in GB: the GPU's, or what is free of the computer's.

    Raises:
        FileNotFoundError: When the folder or a file does not exist.
        ValueError: When the data set is malformed, ``output`` exists or is no YAML file, or the memory is too small.
    """
    if not isinstance(memory_gb, (int, float)) or not memory_gb > 0:
        raise ValueError(f"memory_gb must be a number of GB, such as 8, got {memory_gb!r}.")
    if Path(output).suffix not in (".yaml", ".yml"):
        raise ValueError(f"{output}: the overlay is a YAML file: give --output a name that ends in .yaml.")
    if Path(output).exists():
        raise ValueError(f"{output} exists: give --output another name, or remove it.")
    text = task_overlay(analyze(dataset_dir), dataset_dir, memory_gb)
    write_text(output, text)
    print(text)
    print(f"Written to {output}. Train: python -m monai.bundle run --config_file \"['configs/train.json','{output}']\"")


def _memory_model() -> dict[str, dict[str, Any]]:
    return json.loads(_MEMORY.read_text(encoding="utf-8"))["widths"]


def _need_gb(width: str, voxels: float, stem: Sequence[int], classes: int) -> float:
    """Memory of a training step; the body of the network sees twice the voxels for each axis its stem leaves alone."""
    return step_bytes(_memory_model()[width], voxels * math.prod(2 // s for s in stem), classes) / 1e9


def _spacing(spacing: np.ndarray) -> np.ndarray:
    """The median; for an axis three times coarser than the finest the 10th percentile, if still coarser (nnU-Net)."""
    chosen = np.median(spacing, axis=0)
    for axis in np.flatnonzero(chosen >= 3 * chosen.min()):
        others = np.delete(chosen, axis).max()
        chosen[axis] = max(np.percentile(spacing[:, axis], 10), min(others, chosen[axis]))
    return np.array([float(f"{step:.3g}") for step in chosen])


def _spacing_reason(spacing: np.ndarray) -> str:
    median = np.median(spacing, axis=0)
    if (median >= 3 * median.min()).any():
        return "the median; along an axis three times coarser the 10th percentile, but not finer than the other axes"
    return "the median of the cases"


def _stem_reason(stem: Sequence[int]) -> str:
    if 1 in stem:
        return f"an axis whose spacing is {_COARSE:g} times the finest or more keeps its resolution at the first level"
    return "spacing is much alike along the axes"


def _rotation_lines(stem: Sequence[int]) -> list[str]:
    """Thick slices are turned within themselves alone: turned otherwise, most of a flat patch would leave the image."""
    if stem.count(1) != 1:
        return []
    return [f"rotate_axes: [{stem.index(1)}]  # random rotations stay within the slices"]


def _mirror_lines(class_names: Sequence[str]) -> list[str]:
    """Left and right are mirrored unless a class is named after one: then its mirror image may look like the other."""
    sides = [name for name in class_names if _SIDE.search(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))]
    if not sides:
        return ["mirror_axes: [0]  # half of the patches have left and right mirrored: no class is named after a side"]
    return [
        f"mirror_axes: []  # none: left and right are different classes ({sides[0]})",
        "flip_prob: 0.0",
    ]


def _patch(
    median: np.ndarray, spacing: np.ndarray, stem: Sequence[int], found: Statistics, memory_gb: float
) -> tuple[str, list[int], int, float]:
    """Width, patch, batch and memory of a step: the patch first, then the batch."""
    whole = [max(_LEAST, _MULTIPLE * math.ceil(size / _MULTIPLE)) for size in median]

    def need(width: str, patch: Sequence[int], batch: int = 1) -> float:
        return _need_gb(width, batch * math.prod(patch), stem, len(found.class_names))

    def shrink(width: str) -> list[int]:
        patch = list(whole)
        while need(width, patch) > memory_gb and max(patch) > _LEAST:
            extent = [size * step if size > _LEAST else 0.0 for size, step in zip(patch, spacing)]
            patch[int(np.argmax(extent))] -= _MULTIPLE  # the axis that reaches furthest, in mm
        return patch

    width, patch = "full", shrink("full")
    if math.prod(patch) < min(math.prod(whole) / 2, _USUAL) or need(width, patch) > memory_gb:
        width, patch = "compact", shrink("compact")
    if need(width, patch) > memory_gb:
        least = need(width, patch)
        raise ValueError(f"memory_gb={memory_gb:g} is too little: the smallest patch takes {least:.1f} GB.")
    batch = 1
    while batch < min(4, found.cases) and need(width, patch, batch + 1) <= memory_gb:
        batch += 1
    return width, patch, batch, need(width, patch, batch)


def _intensity_lines(found: Statistics) -> list[str]:
    """CT in Hounsfield units is windowed, anything else goes to mean 0 and deviation 1."""
    if found.is_ct:
        low = min(low for low, _ in found.intensity)
        high = max(high for _, high in found.intensity)
        digits = max(0, 2 - math.floor(math.log10(max(high - low, 1e-6))))  # of CT that is scaled to [0, 1], too
        return [
            "intensity:  # CT: the window from the 0.5 to the 99.5 percentile of the foreground, mean of the cases",
            "  _target_: ScaleIntensityRanged",
            "  keys: image",
            f"  a_min: {low:.{digits}f}  # Hounsfield units",
            f"  a_max: {high:.{digits}f}",
            "  b_min: 0.0",
            "  b_max: 1.0",
            "  clip: true",
        ]
    lines = [
        "intensity:  # no CT: each channel to mean 0 and standard deviation 1",
        "  _target_: NormalizeIntensityd",
        "  keys: image",
        f"  nonzero: {json.dumps(found.is_zero_outside)}  # whether the images are 0 around their object",
        "  channel_wise: true",
    ]
    if found.is_zero_outside:
        lines += [
            f"foreground_crop:  # what is not 0 fills {found.filled:.0%} of the image; training drops the rest",
            "  _target_: CropForegroundd",
            "  keys: [image, label]",
            "  source_key: image",
            "  allow_smaller: true",
        ]
    return lines


def _cache_rate(found: Statistics, spacing: np.ndarray) -> float:
    """Images and labels in float32, as ``CacheDataset`` keeps them."""
    voxels = float((found.shape * found.spacing / spacing).prod(1).sum())
    return min(1.0, math.floor(100 * (free_gb() or 8.0) * 1e9 / 2 / (4 * (len(found.channels) + 1) * voxels)) / 100)


def _meta_lines(found: Statistics, folder: str) -> list[str]:
    said = found.described
    meta = {
        "title": said.get("name", folder),
        "data_source": ", ".join([said.get("name", folder), *filter(None, [said.get("reference")])]),
        "modality": "CT" if found.is_ct else "MR" if _MR.search(" ".join(found.channels)) else "n/a",
        "channel_names": list(found.channels),
        "data_license": said.get("licence", said.get("license", "not stated")),
    }
    comment = "_meta_:  # for metadata.json of a release; complete it before one"
    return [comment, *(f"  {key}: {json.dumps(value)}" for key, value in meta.items())]


def _cropped(found: Statistics) -> str:
    return ", cropped," if found.is_zero_outside else ""


def _list(values: np.ndarray) -> str:
    return "[" + ", ".join(f"{value:g}" if value % 1 else f"{value:.1f}".removesuffix(".0") for value in values) + "]"


if __name__ == "__main__":
    from scripts.clear_errors import command

    command(plan)
