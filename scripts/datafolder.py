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

"""What a data folder tells a config: names of the classes, number of channels, volumes to run inference on.

Training needs a whole data set in the Decathlon's layout (:py:mod:`scripts.datalist`). The network, on the other hand,
must also be made where there is none (export, checks, a plain folder of images): so these functions fall back on
defaults and on the files themselves.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.utils import ensure_tuple

from scripts.datalist import dataset_channels, dataset_classes, load_datalist
from scripts.dicom import series_folders
from scripts.layouts import NoCasesError, NoLabelError, layout_cases
from scripts.output import IMAGE_SUFFIXES, case_name

__all__ = ["channel_count", "class_names", "image_list"]


def class_names(places: str | os.PathLike | Sequence, default: Sequence[str]) -> list[str]:
    """Names of the classes, background first.

    Args:
        places: a data set's folder, a folder of images in it, such as imagesTs, or an image there; or a list of such,
            of which the first with a dataset.json tells.
        default: the names where there is no dataset.json.

    Returns:
        one name per label value, in rising order from 0.

    Raises:
        ValueError: When dataset.json is malformed.
    """
    folder = _dataset_folder(places)
    return list(default) if folder is None else list(dataset_classes(folder).values())


def channel_count(places: str | os.PathLike | Sequence, default: int) -> int:
    """Number of image channels.

    Args:
        places: as for :py:func:`class_names`.
        default: the number where there is no dataset.json.

    Returns:
        the number of channels.

    Raises:
        ValueError: When dataset.json is malformed.
    """
    folder = _dataset_folder(places)
    return default if folder is None else dataset_channels(folder)


def image_list(source: str | os.PathLike | Sequence, layout: str = "decathlon") -> list[dict]:
    """Volumes to run inference on.

    Args:
        source: a volume's file (.nii.gz, .nii, .mha, .mhd, .nrrd), the folder of a DICOM series (one file for each
            slice; needs pydicom), a folder of either, a data set, whose test cases are taken, or a list of these.
        layout: "decathlon", or one of :py:data:`scripts.layouts.LAYOUTS`, whose test cases are taken, or all
            where there are none. A folder of plain images is one in either case.

    Returns:
        Dicts with the absolute path, or paths, "image", sorted by name where they come from a folder.

    Raises:
        FileNotFoundError: When the file or folder does not exist, holds no volume, or lacks a file of a case.
        ValueError: When nothing is given, dataset.json is malformed, a file is no volume, a DICOM series has faults, or
            two volumes have one name.
    """
    found = [case for one in _flat(source) for case in _volumes(one, layout)]
    if not found:
        raise ValueError("no volume is given: give --input a volume or a folder of volumes.")
    names = [case_name(ensure_tuple(case["image"])[0]) for case in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:  # the second label map would take the place of the first
        raise ValueError(f"two of the volumes are called {twice}: give them one at a time, each an --output_dir.")
    return found


def _volumes(path: Path, layout: str) -> list[dict]:
    if path.is_file():
        if not path.name.lower().endswith(IMAGE_SUFFIXES):
            raise ValueError(
                f"{path} is no volume to read ({', '.join(IMAGE_SUFFIXES)}); of a DICOM series give its folder."
            )
        return [{"image": str(path)}]
    if not path.is_dir():
        raise FileNotFoundError(f"The folder {path} does not exist: give --input a volume or a folder of volumes.")
    if layout != "decathlon":
        for labelled in (False, True):
            try:
                return [{"image": item["image"]} for item in layout_cases(path, layout, labelled=labelled)]
            except (NoCasesError, NoLabelError):
                pass  # all have labels, or a folder of plain images
    index = path / "dataset.json"
    content = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    of_nnunet = "test" not in content and "file_ending" in content and (path / "imagesTs").is_dir()
    if content.get("test") or of_nnunet:
        return [{"image": item["image"]} for item in load_datalist(path, "test")]
    folder = path / "imagesTs" if (path / "imagesTs").is_dir() else path
    files = (file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    images = sorted(str(file) for file in files if file.name.lower().endswith(IMAGE_SUFFIXES))
    images += [str(series) for series in series_folders(folder)]
    if not images:
        raise FileNotFoundError(
            f"{folder} holds no volume ({', '.join(IMAGE_SUFFIXES)}, or DICOM files with their preamble): give --input "
            "a volume, a folder of volumes, or a data set whose dataset.json lists test cases."
        )
    return [{"image": image} for image in images]


def _flat(places: Any) -> list[Path]:
    """Absolute paths from one, or from a list of such lists. The command line makes a number of 20230101."""
    if isinstance(places, (list, tuple)):
        return [path for place in places for path in _flat(place)]
    return [Path(os.path.abspath(os.path.expanduser(str(places))))]


def _dataset_folder(places: Any) -> Path | None:
    """The first folder that holds dataset.json: one given, or the one around a folder of its images, or an image."""
    for path in _flat(places):
        folder = path.parent if path.is_file() else path
        if folder.name.startswith("images") and not (folder / "dataset.json").is_file():
            folder = folder.parent
        if (folder / "dataset.json").is_file():
            return folder
    return None
