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

"""Check of a data set's files before training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage
from monai.utils import ensure_tuple, optional_import

__all__ = ["check_dataset"]


def check_dataset(
    datalist: Sequence[dict],
    num_classes: int,
    num_channels: int | None = None,
    image_key: str = "image",
    label_key: str | None = "label",
    label_values: Sequence[int] | None = None,
    check_finite: bool = True,
    check_affine: bool = True,
    max_problems: int = 10,
    progress: bool = True,
) -> str:
    """Read every file of a data list once and raise one error that lists what would break a training.

    Files are read by ``monai.transforms.LoadImage``, so every format that a training can read can be checked.

    Args:
        datalist: dicts with the paths of an image (a file, or a list of files, one per channel) and its label.
        num_classes: number of label values, background included.
        num_channels: number of channels that every image must have. When None, as many as the first image has.
        image_key: key of the image paths.
        label_key: key of the label path, or None to check images alone.
        label_values: the values that labels may have. When None, those from 0 to ``num_classes - 1``.
        check_finite: whether NaN and infinite values in an image are problems.
        check_affine: whether it is a problem when image and label lie further apart in space than half a voxel: once
            brought to one grid, which a training does by their places in space, they no longer match.
        max_problems: number of problems to print in full; the others are counted.
        progress: whether to show a progress bar, where tqdm is installed.

    Returns:
        What was found, in one line: cases, channels, sizes, spacings, and the label values that occur.

    Raises:
        ValueError: When the data list is empty or any file is missing, unreadable or unfit.
    """
    if len(datalist) == 0:
        raise ValueError("The data list is empty: check dataset_dir and the subset asked for.")
    problems = _missing_files(datalist, image_key, label_key)
    damaged = {index for indices, _ in problems for index in indices}
    tqdm, has_tqdm = optional_import("tqdm", name="tqdm")
    cases = tqdm(datalist, desc="Checking data", unit="case") if progress and has_tqdm else datalist
    sizes: list[tuple[int, ...]] = []
    spacings: list[tuple[float, ...]] = []
    values: set[int] = set()
    allowed = np.asarray(range(num_classes) if label_values is None else label_values)
    loader = LoadImage(image_only=True, ensure_channel_first=True)
    for index, item in enumerate(cases):
        if index in damaged:
            continue
        image, message = _read(loader, item[image_key])
        if image is not None:
            if num_channels is None:
                num_channels = image.shape[0]
            message = _image_problems(image, item[image_key], num_channels, check_finite)
            sizes.append(tuple(image.shape[1:]))
            spacings.append(tuple(round(float(step), 3) for step in image.pixdim))
        if message:
            problems.append(([index], message))
        if label_key is None:
            continue
        label, message = _read(loader, item[label_key])
        if label is not None:
            volume = image if image is not None and image.ndim == 4 else None
            message = _label_problems(label, volume, item[label_key], allowed, check_affine)
            values.update(() if message else np.unique(label).astype(int).tolist())
        if message:
            problems.append(([index], message))
    if problems:
        lines = [f"  - {message}" for _, message in problems[:max_problems]]
        if len(problems) > max_problems:
            lines.append(f"  ... and {len(problems) - max_problems} more.")
        cases_hit = len({index for indices, _ in problems for index in indices})
        raise ValueError(
            f"The data set is unfit: {cases_hit} of {len(datalist)} cases have problems.\n" + "\n".join(lines)
        )
    found = [f"{len(datalist)} cases", f"{num_channels} channel" + ("s" if num_channels != 1 else "")]
    found += [_range(sizes) + " voxels", _range(spacings) + " mm"]
    if label_key is not None:
        of = f"0 to {num_classes - 1}" if label_values is None else _listed(allowed)
        never = sorted(set(allowed.tolist()) - values)
        absent = f", {', '.join(map(str, never))} in no case" if never else ""
        found.append(f"label values {', '.join(map(str, sorted(values)))} of {of}{absent}")
    return "; ".join(found)


def _range(triples: Sequence[tuple[float, ...]]) -> str:
    """Least to most along each axis."""
    ends = [(min(axis), max(axis)) for axis in zip(*triples)]
    return " x ".join(f"{low:g}" if low == high else f"{low:g}-{high:g}" for low, high in ends)


def _listed(allowed: np.ndarray) -> str:
    """The values a label may have."""
    if np.array_equal(allowed, np.arange(len(allowed))):
        return f"from 0 to {len(allowed) - 1} (num_classes={len(allowed)})"
    return ", ".join(map(str, allowed))


def _missing_files(datalist: Sequence[dict], image_key: str, label_key: str | None) -> list[tuple[list[int], str]]:
    """Problems that show without reading a file, each with the indices of the cases it concerns."""
    problems: list[tuple[list[int], str]] = []
    missing_folders: dict[str, list[int]] = {}
    for index, item in enumerate(datalist):
        for key in (image_key,) if label_key is None else (image_key, label_key):
            files = ensure_tuple(item.get(key) or ())
            if not files:
                other = ", ".join(_short(v) for k, v in item.items() if k in (image_key, label_key) and v)
                problems.append(([index], f"case {index} ({other or 'no files'}) has no {key!r}"))
            for file in files:
                folder = os.path.dirname(os.path.abspath(file))
                if not os.path.isdir(folder):
                    missing_folders.setdefault(folder, []).append(index)
                elif not os.path.exists(file):
                    problems.append(([index], f"{file}: the {key} file does not exist"))
    gone = [
        (indices, f"{folder}: the folder does not exist, {len(indices)} files were expected in it")
        for folder, indices in missing_folders.items()
    ]
    return gone + problems


def _short(files: str | Sequence[str]) -> str:
    """Name the file, or the first of several."""
    files = ensure_tuple(files)
    return str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def _read(loader: LoadImage, files: str | Sequence[str]) -> tuple[MetaTensor | None, str | None]:
    """Return the array, channel first, or else what hindered reading it."""
    try:
        return loader(files), None
    except Exception as error:  # noqa: BLE001 (the readers of the many formats raise many kinds)
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 200 else reason[:200] + "..."
        return None, f"{_short(files)}: cannot be read as an image ({type(error).__name__}: {reason})"


def _image_problems(
    image: torch.Tensor, files: str | Sequence[str], num_channels: int, check_finite: bool
) -> str | None:
    faults = []
    if image.ndim != 4:
        faults.append(f"is no volume, but has {image.ndim - 1} axes")
    if image.shape[0] != num_channels:
        faults.append(f"has {image.shape[0]} channels instead of {num_channels}")
    if check_finite and not torch.isfinite(image).all():
        faults.append("holds NaN or infinite values")
    return f"{_short(files)}: {', '.join(faults)}" if faults else None


def _label_problems(label: Any, image: Any | None, file: str, allowed: np.ndarray, check_affine: bool) -> str | None:
    faults = []
    if label.shape[0] != 1:
        faults.append(f"the label has {label.shape[0]} channels instead of 1")
    if image is not None and label.shape[1:] != image.shape[1:]:
        faults.append(f"the label's shape {tuple(label.shape[1:])} differs from the image's {tuple(image.shape[1:])}")
    elif image is not None and check_affine:
        distance, tolerance = _corner_distance(image, label)
        if distance > tolerance:
            axes, own = ("".join(nib.aff2axcodes(np.asarray(volume.affine))) for volume in (image, label))
            reason = "their affines differ" if axes == own else f"its axes run {own}, the image's {axes}"
            faults.append(f"the label's voxels lie up to {distance:.1f} mm away from the image's: {reason}")
    values = np.asarray(label)
    if not (values == np.rint(values)).all():
        example = values[values != np.rint(values)].flat[0]
        faults.append(f"label values must be whole numbers, found {example:.9g}")
    else:
        found = np.unique(values)
        wrong = [f"{v:g}" for v in found[~np.isin(found, allowed)]]
        shown = ", ".join(wrong[:5]) + (", ..." if len(wrong) > 5 else "")
        if wrong:
            faults.append(f"label values must be {_listed(allowed)}, found {shown}")
    return f"{_short(file)}: {', '.join(faults)}" if faults else None


def _corner_distance(image: Any, label: Any) -> tuple[float, float]:
    """Return how far the corner voxels of two arrays of one shape lie apart at most, and half a voxel, in mm."""
    affines = [np.asarray(array.affine, dtype=np.float64) for array in (image, label)]
    rank = affines[0].shape[0] - 1
    if affines[0].shape != affines[1].shape or image.ndim - 1 != rank:
        return 0.0, 0.0
    corners = np.array([[*corner, 1] for corner in np.ndindex(*(2,) * rank)], dtype=np.float64)
    corners[:, :rank] *= np.array(image.shape[1:]) - 1
    apart = corners @ (affines[0] - affines[1]).T
    voxel = np.linalg.norm(affines[0][:rank, :rank], axis=0)
    return float(np.linalg.norm(apart[:, :rank], axis=1).max()), float(voxel.min() / 2)
