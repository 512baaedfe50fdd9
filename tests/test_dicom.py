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

"""DICOM series as input, against the same volumes as NIfTI."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from monai.data import MetaTensor
from monai.transforms import LoadImage, Orientation
from pydicom.uid import generate_uid

from scripts.datafolder import image_list
from scripts.dicom import check_series, series_folders
from tests.lookalikes import write_series


def affine_of(kind: str) -> np.ndarray:
    spacing = np.diag([0.8, 0.9, 2.5, 1.0])
    turned = {
        "axial": np.diag([-1.0, -1.0, 1.0, 1.0]),
        "sagittal": np.array([[0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]]),
        "coronal": np.array([[-1, 0, 0, 0], [0, 0, -1, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]]),
    }
    if kind == "oblique":
        a, b = np.deg2rad([20, 13])
        x = np.array([[1, 0, 0, 0], [0, np.cos(a), -np.sin(a), 0], [0, np.sin(a), np.cos(a), 0], [0, 0, 0, 1]])
        z = np.array([[np.cos(b), -np.sin(b), 0, 0], [np.sin(b), np.cos(b), 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        affine = x @ z @ turned["axial"] @ spacing
    else:
        affine = turned[kind] @ spacing
    affine[:3, 3] = [30.5, -12.25, 7.0]
    return affine


def volume(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1500, (14, 11, 9))


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("kind", ["axial", "sagittal", "coronal", "oblique"])
def test_a_series_lies_where_its_nifti_lies(kind, backwards, tmp_path):
    values, affine = volume(), affine_of(kind)
    nib.save(nib.Nifti1Image(values.astype(np.int16), affine), tmp_path / "volume.nii.gz")
    write_series(tmp_path / "series", values, affine, list(range(9, 0, -1)) if backwards else None)
    (case,) = image_list(tmp_path / "series")
    to_ras = Orientation(axcodes="RAS", labels=None)
    found, expected = (
        to_ras(LoadImage(image_only=True, ensure_channel_first=True)(path))
        for path in (case["image"], tmp_path / "volume.nii.gz")
    )
    assert isinstance(found, MetaTensor)
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-4)
    np.testing.assert_array_equal(found, expected)


def test_folders_of_series(tmp_path):
    for name in ("b", "a"):
        write_series(tmp_path / name, volume(), affine_of("axial"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "readme.txt").write_text("no volume")
    assert [path.name for path in series_folders(tmp_path)] == ["a", "b"]
    assert [case["image"] for case in image_list(tmp_path)] == [str(tmp_path / "a"), str(tmp_path / "b")]
    (tmp_path / "a" / ".DS_Store").write_text("hidden")
    assert len(image_list([tmp_path / "a"])) == 1


def spoil(kind: str, folder: Path, files: list[Path]) -> None:
    if kind == "missing":
        files[4].unlink()
    elif kind == "single":
        for file in files[1:]:
            file.unlink()
    elif kind == "stray":
        (folder / "report.pdf").write_bytes(b"%PDF" + bytes(200))
    else:
        changed = pydicom.dcmread(files[3])
        if kind == "other series":
            changed.SeriesInstanceUID = generate_uid()
        elif kind == "order":
            changed.InstanceNumber = 99
        elif kind == "size":
            changed.Rows = 5
        elif kind == "no position":
            del changed.ImagePositionPatient
        changed.save_as(files[3])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"missing or out of order, 5\.00 mm lie between .* 2\.50 mm between others"),
        ("order", "missing or out of order"),
        ("single", "a single slice"),
        ("stray", r"report\.pdf is no DICOM file"),
        ("other series", "holds 2 DICOM series"),
        ("size", "differ in their size or orientation"),
        ("no position", "has no ImagePositionPatient"),
    ],
)
def test_faults_of_a_series_are_named(kind, message, tmp_path):
    files = write_series(tmp_path / "series", volume(), affine_of("oblique"))
    check_series(tmp_path / "series")
    spoil(kind, tmp_path / "series", files)
    with pytest.raises(ValueError, match=message) as error:
        image_list(tmp_path / "series")
    assert str(tmp_path / "series") in str(error.value)
