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

"""Data lists of a folder, with folds, and a check of the files before training.

Unless another layout is named, it is the Medical Segmentation Decathlon's: a folder with ``dataset.json`` beside
``imagesTr``, ``labelsTr`` and, for test cases, ``imagesTs``. The ``training`` entries of dataset.json hold an ``image``
(one file, or a list of files, one per channel) and a ``label``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor, load_decathlon_datalist, partition_dataset
from monai.transforms import LoadImage
from monai.utils import ensure_tuple, optional_import

from scripts.layouts import layout_cases

__all__ = ["case_groups", "check_dataset", "dataset_channels", "dataset_classes", "load_datalist"]

_SUBSETS = ("training", "validation", "all", "test")
_LAYOUT = (
    "expected the Medical Segmentation Decathlon's layout: a folder with dataset.json, imagesTr and labelsTr "
    "(and imagesTs for test cases); python -m scripts.download fetches the Decathlon's own tasks"
)


def load_datalist(
    dataset_dir: str | os.PathLike,
    subset: str = "training",
    fold: int = 0,
    num_folds: int = 5,
    seed: int = 0,
    layout: str = "decathlon",
    test_cases: Sequence[str] = (),
) -> list[dict]:
    """List the cases of a subset of a data set.

    The labelled cases are sorted by file name, shuffled by ``seed`` and dealt out to ``num_folds`` folds, so that the
    split depends on the names alone, whatever the order in dataset.json and wherever the folder lies. Cases of one
    patient stay together where the layout tells them, the Decathlon's by an entry's "group" in dataset.json.

    Args:
        dataset_dir: the data set's folder.
        subset: "training" for all folds but ``fold``, "validation" for ``fold``, "all" for every case of the folds,
            "test" for the test cases. In the Decathlon's layout these carry a label where ``labelsTs`` holds a file
            named like the image.
        fold: number of the fold to validate on, from 0. Only for "training" and "validation".
        num_folds: number of folds, at least 2. Only for "training" and "validation".
        seed: seed of the shuffle.
        layout: "decathlon", or one of :py:data:`scripts.layouts.LAYOUTS`.
        test_cases: names of labelled cases, the image's file name without suffix, or of patients, that belong to no
            fold: they are the "test" subset then, with the other cases of their patients.

    Returns:
        Dicts sorted by file name with the absolute paths "image" (a string or a list of strings) and "label" (a string)
        and whatever else the layout tells of the case.

    Raises:
        FileNotFoundError: When the folder, dataset.json, or a folder named by its entries does not exist.
        ValueError: When an argument is out of range, there are fewer cases than folds, dataset.json is malformed, or
            there is no case of the subset, or none of a name in ``test_cases``.
    """
    if subset not in _SUBSETS:
        raise ValueError(f"subset must be one of {', '.join(_SUBSETS)}, got {subset!r}.")
    unlabelled = subset == "test" and not test_cases
    if layout == "decathlon":
        items = _load_items(dataset_dir, "test" if unlabelled else "training")
    else:
        items = layout_cases(dataset_dir, layout, labelled=not unlabelled)
    if test_cases:
        wanted, names = set(map(str, test_cases)), [{_case_name(item), item.get("group")} for item in items]
        unknown = wanted.difference(*names)
        if unknown:
            raise ValueError(f"{dataset_dir} has no case {sorted(unknown)[0]!r}, which test_cases names.")
        own_group = case_groups(items)
        tested = {group for group, own in zip(own_group, names) if not own.isdisjoint(wanted)}
        items = [item for item, group in zip(items, own_group) if (group in tested) == (subset == "test")]
    if subset in ("all", "test"):
        return items

    for name, value, least in (("num_folds", num_folds, 2), ("fold", fold, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    if fold >= num_folds:
        raise ValueError(f"fold must be from 0 to {num_folds - 1} where num_folds={num_folds}, got {fold}.")
    own_group = case_groups(items)
    groups = list(dict.fromkeys(own_group))
    if len(groups) < num_folds:
        what = "labelled cases" if len(groups) == len(items) else "groups of labelled cases"
        raise ValueError(
            f"{dataset_dir} lists {len(groups)} {what}, too few for num_folds={num_folds}: lower num_folds."
        )
    folds = partition_dataset(range(len(groups)), num_partitions=num_folds, shuffle=True, seed=seed)
    held_out = {groups[index] for index in folds[fold]}
    return [item for item, group in zip(items, own_group) if (group in held_out) == (subset == "validation")]


def case_groups(items: Sequence[Mapping[str, Any]]) -> list[int | str]:
    """
    Args:
        items: cases, see :py:func:`load_datalist`.

    Returns:
        what the cases of one patient have in common: their "group", or the place in the list of a case without one.
    """
    return [item.get("group", index) for index, item in enumerate(items)]


def _case_name(item: dict) -> str:
    return item.get("case") or re.sub(r"\.nii(\.gz)?$", "", os.path.basename(ensure_tuple(item["image"])[0]))


def dataset_channels(dataset_dir: str | os.PathLike) -> int:
    """Count the image channels that dataset.json declares in "modality" (or, in nnU-Net v2's form, "channel_names").

    Args:
        dataset_dir: the folder that holds dataset.json.

    Returns:
        The number of channels.

    Raises:
        FileNotFoundError: When the folder or dataset.json does not exist.
        ValueError: When dataset.json is malformed or declares no channels.
    """
    path, content = _read_json(dataset_dir)
    channels = content.get("modality", content.get("channel_names"))
    if not isinstance(channels, (dict, list)) or not channels:
        raise ValueError(f"{path} declares no channels: expected 'modality', such as {{'0': 'CT'}}.")
    return len(channels)


def dataset_classes(dataset_dir: str | os.PathLike) -> dict[int, str]:
    """Read the label values that dataset.json declares in "labels", as value to name or, as nnU-Net v2 does, reversed.

    Args:
        dataset_dir: the folder that holds dataset.json.

    Returns:
        Names by label value, in rising order from 0. The background is added where value 0 is not declared.

    Raises:
        FileNotFoundError: When the folder or dataset.json does not exist.
        ValueError: When dataset.json is malformed, or its labels are not one name for each of the values 0, 1, 2, ...
    """
    path, content = _read_json(dataset_dir)
    labels = content.get("labels")
    if not isinstance(labels, dict) or not labels:
        raise ValueError(f"{path} declares no labels: expected 'labels', such as {{'0': 'background', '1': 'liver'}}.")
    pairs = list(labels.items())
    if not all(_is_whole(key) for key in labels):
        pairs = [(value, name) for name, value in pairs]
    if not all(_is_whole(value) for value, _ in pairs):
        raise ValueError(f"{path}: every label must have one whole number as its value, got {labels}.")
    classes = {int(value): str(name) for value, name in pairs}
    if len(classes) < len(pairs):
        raise ValueError(f"{path}: two labels have the same value: {labels}.")
    classes.setdefault(0, "background")
    if sorted(classes) != list(range(len(classes))):
        raise ValueError(f"{path}: label values must run from 0 without a gap, got {sorted(classes)}.")
    return dict(sorted(classes.items()))


def check_dataset(
    datalist: Sequence[dict],
    num_classes: int,
    num_channels: int | None = None,
    image_key: str = "image",
    label_key: str | None = "label",
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
        check_finite: whether NaN and infinite values in an image are problems.
        check_affine: whether it is a problem when image and label lie further apart in space than one voxel's diagonal,
            since they no longer match once resampled.
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
            message = _label_problems(label, image, item[label_key], num_classes, check_affine)
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
        found.append(f"label values {', '.join(map(str, sorted(values)))} of 0 to {num_classes - 1}")
    return "; ".join(found)


def _range(triples: Sequence[tuple[float, ...]]) -> str:
    """Least to most along each axis."""
    ends = [(min(axis), max(axis)) for axis in zip(*triples)]
    return " x ".join(f"{low:g}" if low == high else f"{low:g}-{high:g}" for low, high in ends)


def _read_json(dataset_dir: str | os.PathLike) -> tuple[Path, dict]:
    """Return the path and the content of a folder's dataset.json."""
    folder = Path(os.path.abspath(os.path.expanduser(dataset_dir)))
    if not folder.is_dir():
        raise FileNotFoundError(f"The data set folder {folder} does not exist; {_LAYOUT}.")
    path = folder / "dataset.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no dataset.json; {_LAYOUT}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; {_LAYOUT}.")  # noqa: TRY004 (the file's fault, no caller's)
    return path, content


def _load_items(dataset_dir: str | os.PathLike, key: str) -> list[dict]:
    """Return the entries under a key of dataset.json with absolute paths, sorted by file name."""
    path, content = _read_json(dataset_dir)
    entries = content.get(key)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} lists no cases under {key!r}; {_LAYOUT}.")
    if key == "training":
        for entry in entries:
            if not isinstance(entry, dict) or not entry.get("image") or not entry.get("label"):
                raise ValueError(
                    f"{path}: every entry under 'training' must have an 'image' and a 'label', got {entry}."
                )
    items = load_decathlon_datalist(path, is_segmentation=True, data_list_key=key, base_dir=path.parent)
    for item in items:
        if key == "test" and "label" not in item:
            label = path.parent / "labelsTs" / _label_name(item["image"])
            if label.is_file():
                item["label"] = str(label)
    if any(item.get("group") is not None for item in items):  # then all have one: batches are made of equal keys
        for item in items:
            group = item.get("group")
            item["group"] = ensure_tuple(item["image"])[0] if group is None else str(group)
    folders = {
        os.path.dirname(file) for item in items for k in ("image", "label") for file in ensure_tuple(item.get(k, ()))
    }
    missing = sorted(folder for folder in folders if not os.path.isdir(folder))
    if missing:
        raise FileNotFoundError(f"{path} names files in {', '.join(missing)}, which does not exist; {_LAYOUT}.")
    images = [ensure_tuple(item["image"]) for item in items]
    twice = next((image for image in images if images.count(image) > 1), None)
    if twice:  # its copies would lie on both sides of a fold
        raise ValueError(f"{path} lists {', '.join(twice)} more than once under {key!r}: list every case once.")
    names = [os.path.basename(image[0]) for image in images]
    alike = next((name for name in names if names.count(name) > 1), None)
    if alike:  # results are told apart by the name
        raise ValueError(f"{path} lists two files called {alike} under {key!r}: give each case a name of its own.")
    return sorted(items, key=lambda item: [(os.path.basename(file), file) for file in ensure_tuple(item["image"])])


def _label_name(image: str | Sequence[str]) -> str:
    """Name of the label of an image: the image's own or, for one file per channel, without the channel's number."""
    if isinstance(image, str):
        return os.path.basename(image)
    return re.sub(r"_\d{4}(?=\.)", "", os.path.basename(image[0]))


def _is_whole(value: object) -> bool:
    if isinstance(value, str):
        return value.isdecimal()
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


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
    if image.shape[0] != num_channels:
        faults.append(f"has {image.shape[0]} channels instead of {num_channels}")
    if check_finite and not torch.isfinite(image).all():
        faults.append("holds NaN or infinite values")
    return f"{_short(files)}: {', '.join(faults)}" if faults else None


def _label_problems(
    label: torch.Tensor, image: torch.Tensor | None, file: str, num_classes: int, check_affine: bool
) -> str | None:
    faults = []
    if label.shape[0] != 1:
        faults.append(f"the label has {label.shape[0]} channels instead of 1")
    if image is not None and label.shape[1:] != image.shape[1:]:
        faults.append(f"the label's shape {tuple(label.shape[1:])} differs from the image's {tuple(image.shape[1:])}")
    elif image is not None and check_affine:
        distance, tolerance = _corner_distance(image, label)
        if distance > tolerance:
            faults.append(f"the label lies up to {distance:.1f} mm away from the image: their affines differ")
    values = np.asarray(label)
    if not (values == np.rint(values)).all():
        example = values[values != np.rint(values)].flat[0]
        faults.append(f"label values must be whole numbers, found {example:g}")
    elif values.min() < 0 or values.max() >= num_classes:
        found = np.unique(values)
        wrong = [f"{v:g}" for v in found[(found < 0) | (found >= num_classes)]]
        shown = ", ".join(wrong[:5]) + (", ..." if len(wrong) > 5 else "")
        faults.append(f"label values must be from 0 to {num_classes - 1} (num_classes={num_classes}), found {shown}")
    return f"{_short(file)}: {', '.join(faults)}" if faults else None


def _corner_distance(image: Any, label: Any) -> tuple[float, float]:
    """Return how far the corner voxels of two arrays of one shape lie apart at most, and a voxel's diagonal, in mm."""
    affines = [np.asarray(array.affine, dtype=np.float64) for array in (image, label)]
    rank = affines[0].shape[0] - 1
    if affines[0].shape != affines[1].shape or image.ndim - 1 != rank:
        return 0.0, 0.0
    corners = np.array([[*corner, 1] for corner in np.ndindex(*(2,) * rank)], dtype=np.float64)
    corners[:, :rank] *= np.array(image.shape[1:]) - 1
    apart = corners @ (affines[0] - affines[1]).T
    return float(np.linalg.norm(apart[:, :rank], axis=1).max()), float(np.linalg.norm(affines[0][:rank, :rank]))
