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

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
from monai.data import MetaTensor
from monai.transforms import LoadImage, Orientation
from pydicom.uid import generate_uid

from scripts.datafolder import image_list
from scripts.dicom import check_series, series_folders
from scripts.dicom_seg import dicom_segmentation
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


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("kind", ["sagittal", "oblique"])
def test_a_segmentation_refers_to_the_slices_it_lies_on(kind, backwards, tmp_path):
    numbers = list(range(9, 0, -1)) if backwards else None
    write_series(tmp_path / "series", volume(), affine_of(kind), numbers)
    image = LoadImage(image_only=True, ensure_channel_first=True)(tmp_path / "series")
    label = MetaTensor((image > 800).float() + (image > 1300).float() * 2, affine=image.affine)  # 0, 1, 3
    segmentation = dicom_segmentation(label, tmp_path / "series", ["background", "one", "", "three"], "1.2.3")
    segmentation.save_as(tmp_path / "seg.dcm")
    found = highdicom.seg.segread(tmp_path / "seg.dcm")
    assert found.Modality == "SEG" and found.number_of_segments == 2
    assert [found.get_segment_description(n).segment_label for n in (1, 2)] == ["one", "three"]
    assert found.FrameOfReferenceUID == pydicom.dcmread(next((tmp_path / "series").iterdir())).FrameOfReferenceUID
    for file in (tmp_path / "series").iterdir():  # each slice's own pixels, above the same thresholds
        slice_ = pydicom.dcmread(file)
        values = slice_.pixel_array.astype(int) - 1024
        (plane,) = found.get_pixels_by_source_instance([slice_.SOPInstanceUID], combine_segments=True)
        np.testing.assert_array_equal(plane, (values > 800) * 1 + (values > 1300) * 1)


def test_a_segmentation_of_nothing(tmp_path):
    write_series(tmp_path / "series", volume(), affine_of("axial"))
    image = LoadImage(image_only=True, ensure_channel_first=True)(tmp_path / "series")
    empty = dicom_segmentation(image * 0, tmp_path / "series", ["background", "one"], "1.2.3")
    assert not empty.pixel_array.any()
    with pytest.raises(ValueError, match="no class has a name"):
        dicom_segmentation(image * 0, tmp_path / "series", ["background"], "1.2.3")
    with pytest.raises(ValueError, match="are not those of"):
        dicom_segmentation(image[:, 1:], tmp_path / "series", ["background", "one"], "1.2.3")


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
