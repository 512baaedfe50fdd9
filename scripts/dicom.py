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

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

__all__ = ["add_empty", "check_series", "read_series", "series_folders"]

_NEEDED = (
    *("SeriesInstanceUID", "InstanceNumber", "Rows", "Columns"),
    *("PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient"),
)
# What DICOM lets be empty, but not absent; anonymisation often takes them away.
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber"),
    *("StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)


def series_folders(folder: str | os.PathLike) -> list[Path]:
    """
    Args:
        folder: may be a DICOM series, one file for each slice, or hold such folders at any depth.

    Returns:
        the series that lie in it, checked, by name; none where there is no DICOM file. Of several, those with faults,
        such as a localizer of one slice, are left out, and logged.

    Raises:
        ValueError: When the folder itself is a series that cannot be read as one volume, or all that it holds are;
            see :py:func:`check_series`.
    """
    folder = Path(folder)
    if _has_slices(folder):
        check_series(folder)
        return [folder]
    found = sorted(Path(path) for path, _, _ in os.walk(folder) if _has_slices(Path(path)))
    fit, faults = [], []
    for path in found:
        try:
            check_series(path)
            fit.append(path)
        except ValueError as error:
            faults.append(str(error))
    if faults and not fit:
        raise ValueError("; ".join(faults))
    for fault in faults:
        logging.getLogger(__name__).warning(f"A DICOM series is left out: {fault}")
    return fit


def check_series(folder: str | os.PathLike) -> None:
    """
    Make sure that a folder holds one series whose slices lie behind each other at equal distances: MONAI's reader takes
    every file of a folder for a slice of one volume, in the order of their instance numbers.

    Args:
        folder: with one file for each slice.

    Raises:
        ValueError: naming the folder or file that is at fault.
    """
    folder = Path(folder)
    inner = next((path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")), None)
    if inner is not None:
        raise ValueError(f"{folder} holds a folder, {inner.name}, besides slices: move it elsewhere.")
    for file in _files(folder):
        if not _is_dicom(file):
            raise ValueError(f"{file} is no DICOM file, but the folder's others are: move it elsewhere.")
    slices = read_series(folder, stop_before_pixels=True)
    series = {str(header.SeriesInstanceUID) for header in slices}
    if len(series) > 1:
        raise ValueError(f"{folder} holds {len(series)} DICOM series: put each into a folder of its own.")
    if len(slices) < 2:
        raise ValueError(f"{folder} holds a single slice: give the folder of a whole series.")
    planes = np.array(
        [
            [header.Rows, header.Columns, *map(float, header.PixelSpacing), *map(float, header.ImageOrientationPatient)]
            for header in slices
        ]
    )
    if not np.allclose(planes, planes[0], rtol=0, atol=1e-4):
        raise ValueError(f"{folder}: the slices differ in their size, spacing or orientation.")
    positions = np.array([header.ImagePositionPatient for header in slices], dtype=float)
    if len(np.unique(positions.round(3), axis=0)) < len(slices):
        raise ValueError(f"{folder} holds several volumes of one place (time points, echoes): keep one of them.")
    between = np.diff(positions, axis=0)
    steps = between @ np.cross(planes[0, 4:7], planes[0, 7:])
    usual = np.median(steps)
    if (np.abs(steps - usual) > 0.05 * abs(usual)).any():
        worst = int(np.abs(steps - usual).argmax())
        raise ValueError(
            f"{folder}: slices are missing or out of order, {abs(steps[worst]):.2f} mm lie between numbers "
            f"{slices[worst].InstanceNumber} and {slices[worst + 1].InstanceNumber}, {abs(usual):.2f} mm elsewhere."
        )
    aside = np.linalg.norm(between - np.median(between, axis=0), axis=1)  # a gantry's tilt moves all alike
    if (aside > 0.05 * abs(usual)).any():
        worst = int(aside.argmax())
        raise ValueError(
            f"{folder}: the slices do not lie in one line, number {slices[worst + 1].InstanceNumber} lies "
            f"{aside[worst]:.2f} mm beside where {slices[worst].InstanceNumber} points."
        )


def read_series(folder: str | os.PathLike, **options: Any) -> list:
    """
    Args:
        folder: with one file for each slice; needs pydicom.
        **options: of ``pydicom.dcmread``.

    Returns:
        pydicom's data sets in the order in which MONAI's reader stacks them.

    Raises:
        ValueError: When a slice lacks what its place is known by.
    """
    dcmread, _ = optional_import("pydicom", name="dcmread")
    slices = []
    for file in _files(Path(folder)):
        slices.append(dcmread(file, **options))
        missing = [tag for tag in _NEEDED if slices[-1].get(tag) in (None, "")]
        if missing:
            raise ValueError(f"{file} has no {missing[0]}: it is no slice of a CT or MR series, or multi-frame.")
    return sorted(slices, key=lambda header: int(header.InstanceNumber))


def add_empty(header: Any) -> None:
    """
    Give a slice what highdicom takes over from it, and DICOM lets be empty, but not absent.

    Args:
        header: pydicom's data set, which is changed.
    """
    for tag in _MAY_BE_EMPTY:
        if tag not in header:
            setattr(header, tag, None)


def _files(folder: Path) -> list[Path]:
    """Those that MONAI's reader would take for slices."""
    files = (file for file in folder.iterdir() if file.is_file())
    return sorted(file for file in files if not file.name.startswith(".") and file.name != "DICOMDIR")


def _has_slices(folder: Path) -> bool:
    return any(_is_dicom(file) for file in _files(folder))


def _is_dicom(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(132)[128:] == b"DICM"
