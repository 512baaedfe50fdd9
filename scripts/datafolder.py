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

from scripts.datalist import dataset_channels, dataset_classes, load_datalist
from scripts.layouts import layout_cases

__all__ = ["channel_count", "class_names", "image_list"]

_IMAGE_SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")


def class_names(dataset_dir: str | os.PathLike, default: Sequence[str]) -> list[str]:
    """Names of the classes, background first.

    Args:
        dataset_dir: a data set's folder, or a folder of images in it, such as imagesTs.
        default: the names where there is no dataset.json.

    Returns:
        one name per label value, in rising order from 0.

    Raises:
        ValueError: When dataset.json is malformed.
    """
    folder = _dataset_folder(dataset_dir)
    return list(default) if folder is None else list(dataset_classes(folder).values())


def channel_count(dataset_dir: str | os.PathLike, default: int) -> int:
    """Number of image channels.

    Args:
        dataset_dir: a data set's folder, or a folder of images in it, such as imagesTs.
        default: the number where there is no dataset.json.

    Returns:
        the number of channels.

    Raises:
        ValueError: When dataset.json is malformed.
    """
    folder = _dataset_folder(dataset_dir)
    return default if folder is None else dataset_channels(folder)


def image_list(dataset_dir: str | os.PathLike, layout: str = "decathlon") -> list[dict]:
    """Volumes to run inference on: the test cases of a data set, or every volume that lies in a plain folder.

    Args:
        dataset_dir: a folder with dataset.json, with imagesTs, or with image files right in it
            (.nii.gz, .nii, .mha, .mhd, .nrrd; one volume each).
        layout: "decathlon", or one of :py:data:`scripts.layouts.LAYOUTS`, whose test cases are taken, or all
            where there are none. A folder of plain images is one in either case.

    Returns:
        Dicts with the absolute path, or paths, "image", sorted by name.

    Raises:
        FileNotFoundError: When the folder does not exist, or holds no volume.
        ValueError: When dataset.json is malformed.
    """
    folder = Path(os.path.abspath(os.path.expanduser(dataset_dir)))
    if not folder.is_dir():
        raise FileNotFoundError(f"The folder {folder} does not exist: give --dataset_dir a folder of images.")
    if layout != "decathlon":
        for labelled in (False, True):
            try:
                return [{"image": item["image"]} for item in layout_cases(folder, layout, labelled=labelled)]
            except FileNotFoundError:
                pass  # all have labels, or a folder of plain images
    path = folder / "dataset.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("test"):
        return [{"image": item["image"]} for item in load_datalist(folder, "test")]
    source = folder / "imagesTs" if (folder / "imagesTs").is_dir() else folder
    images = sorted(
        str(file) for file in source.iterdir() if file.name.endswith(_IMAGE_SUFFIXES) and not file.name.startswith(".")
    )
    if not images:
        raise FileNotFoundError(
            f"{source} holds no volume ({', '.join(_IMAGE_SUFFIXES)}): give --dataset_dir a folder of images, or a "
            "data set whose dataset.json lists test cases."
        )
    return [{"image": image} for image in images]


def _dataset_folder(dataset_dir: str | os.PathLike) -> Path | None:
    """The folder that holds dataset.json: the one given, or the one around a folder of its images."""
    folder = Path(os.path.abspath(os.path.expanduser(dataset_dir)))
    if folder.name.startswith("images") and not (folder / "dataset.json").is_file():
        folder = folder.parent
    return folder if (folder / "dataset.json").is_file() else None
