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

import os
from pathlib import Path

import numpy as np
from monai.utils import optional_import

__all__ = ["check_series", "series_folders"]


def series_folders(folder: str | os.PathLike) -> list[Path]:
    """
    Args:
        folder: may be a DICOM series, one file for each slice, or hold such folders.

    Returns:
        the series that lie in it, checked, by name; none where there is no DICOM file.

    Raises:
        ValueError: When a series is none that can be read as one volume; see :py:func:`check_series`.
    """
    folder = Path(folder)
    candidates = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    found = [path for path in candidates if any(_is_dicom(file) for file in _files(path))]
    for path in found:
        check_series(path)
    return found


def check_series(folder: str | os.PathLike) -> None:
    """
    Make sure that a folder holds one series whose slices lie behind each other at equal distances: MONAI's reader takes
    every file of a folder for a slice of one volume, in the order of their instance numbers.

    Args:
        folder: with one file for each slice.

    Raises:
        ValueError: naming the folder or file that is at fault.
    """
    pydicom, _ = optional_import("pydicom")
    slices = []
    for file in _files(Path(folder)):
        if not _is_dicom(file):
            raise ValueError(f"{file} is no DICOM file, but the folder's others are: move it elsewhere.")
        slices.append((file, pydicom.dcmread(file, stop_before_pixels=True)))
    for file, header in slices:
        for tag in ("InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient", "SeriesInstanceUID"):
            if tag not in header:
                raise ValueError(f"{file} has no {tag}: it is no slice of a CT or MR series (or a multi-frame file).")
    series = {str(header.SeriesInstanceUID) for _, header in slices}
    if len(series) > 1:
        raise ValueError(f"{folder} holds {len(series)} DICOM series: put each into a folder of its own.")
    shapes = {(header.Rows, header.Columns, *map(float, header.ImageOrientationPatient)) for _, header in slices}
    if len(shapes) > 1:
        raise ValueError(f"{folder}: the slices differ in their size or orientation.")
    if len(slices) < 2:
        raise ValueError(f"{folder} holds a single slice: give the folder of a whole series.")
    slices.sort(key=lambda pair: int(pair[1].InstanceNumber))
    orientation = np.array(slices[0][1].ImageOrientationPatient, dtype=float).reshape(2, 3)
    positions = np.array([header.ImagePositionPatient for _, header in slices], dtype=float) @ np.cross(*orientation)
    steps = np.diff(positions)
    usual = np.median(steps)
    if usual == 0 or (np.abs(steps - usual) > 0.05 * abs(usual)).any():
        worst = int(np.abs(steps - usual).argmax())
        raise ValueError(
            f"{folder}: slices are missing or out of order, {abs(steps[worst]):.2f} mm lie between "
            f"{slices[worst][0].name} and {slices[worst + 1][0].name}, {abs(usual):.2f} mm between others."
        )


def _files(folder: Path) -> list[Path]:
    """Those that MONAI's reader would take."""
    return sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))


def _is_dicom(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(132)[128:] == b"DICM"
