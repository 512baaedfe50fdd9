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
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage, Orientation

from scripts.datafolder import image_list
from scripts.dicom import check_series, series_folders
from scripts.dicom_seg import dicom_segmentation
from scripts.output import case_name
from tests.lookalikes import write_series

pydicom, highdicom = (pytest.importorskip(name) for name in ("pydicom", "highdicom"))


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


def test_a_folder_as_a_scanner_exports_it(tmp_path, caplog):
    for name in ("study/1.2.840.2", "study/1.2.840.1", "localizer"):
        files = write_series(tmp_path / name, volume(), affine_of("axial"))
    for file in files[1:]:
        file.unlink()
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "study" / "1.2.840.1" / ".DS_Store").write_text("hidden")
    (tmp_path / "readme.txt").write_text("no volume")
    series = [tmp_path / "study" / name for name in ("1.2.840.1", "1.2.840.2")]
    assert series_folders(tmp_path) == series
    assert "left out" in caplog.text and "localizer holds a single slice" in caplog.text
    assert [case_name(path) for path in series] == ["1.2.840.1", "1.2.840.2"]
    nib.save(nib.Nifti1Image(volume().astype(np.int16), np.eye(4)), tmp_path / "volume.nii.gz")
    expected = [str(tmp_path / "volume.nii.gz"), *map(str, series)]
    assert [case["image"] for case in image_list(tmp_path)] == expected
    assert len(image_list([tmp_path / "volume.nii.gz", [series[0]]])) == 2


def test_volumes_of_one_name_are_refused(tmp_path):
    for name in ("a.nii", "a.nii.gz"):
        nib.save(nib.Nifti1Image(volume().astype(np.int16), np.eye(4)), tmp_path / name)
    with pytest.raises(ValueError, match="two of the volumes are called a"):
        image_list(tmp_path)
    with pytest.raises(ValueError, match="no volume is given"):
        image_list([])


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("kind", ["sagittal", "oblique"])
def test_a_segmentation_refers_to_the_slices_it_lies_on(kind, backwards, tmp_path):
    numbers = list(range(9, 0, -1)) if backwards else None
    write_series(tmp_path / "series", volume(), affine_of(kind), numbers)
    image = LoadImage(image_only=True, ensure_channel_first=True)(tmp_path / "series")
    label = MetaTensor((image > 0).float() + (image > 800).float() + (image > 1300).float(), affine=image.affine)
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
        np.testing.assert_array_equal(plane, np.where(values > 1300, 2, (values > 0) & (values <= 800)))  # no name: 2


@pytest.mark.parametrize("character_set", ["ISO_IR 100", None])
def test_names_of_any_letters(character_set, tmp_path):
    """Of classes, and of a patient as the series has it."""
    for file in write_series(tmp_path / "series", volume(), affine_of("axial")):
        slice_ = pydicom.dcmread(file)
        if character_set is None:
            slice_.pop("SpecificCharacterSet", None)
        else:
            slice_.SpecificCharacterSet, slice_.PatientName = character_set, "Müller^Jürgen"
        slice_.save_as(file)
    image = LoadImage(image_only=True, ensure_channel_first=True)(tmp_path / "series")
    names = ["antérieur", "海马"]
    label = image * 0 + 1
    dicom_segmentation(label, tmp_path / "series", ["background", *names], "1.2.3").save_as(tmp_path / "seg.dcm")
    found = highdicom.seg.segread(tmp_path / "seg.dcm")
    assert [found.get_segment_description(n).segment_label for n in (1, 2)] == names
    assert character_set is None or found.PatientName == "Müller^Jürgen"
    with pytest.raises(ValueError, match="longer than the 64 characters"):
        dicom_segmentation(label, tmp_path / "series", ["background", "x" * 65], "1.2.3")


def test_a_segmentation_of_many_classes(tmp_path):
    write_series(tmp_path / "series", volume(), affine_of("axial"))
    image = LoadImage(image_only=True, ensure_channel_first=True)(tmp_path / "series")
    label = MetaTensor(torch.where(image > 500, 299.0, 0.0), affine=image.affine)
    names = ["background", *map(str, range(1, 300))]
    segmentation = dicom_segmentation(label, tmp_path / "series", names, "1.2.3")
    assert {int(number) for number in segmentation.segment_numbers} >= {299}
    used = {
        int(frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        for frame in segmentation.PerFrameFunctionalGroupsSequence
    }
    assert used == {299}


def test_a_segmentation_of_nothing(tmp_path):
    write_series(tmp_path / "series", volume(), affine_of("axial"))
    image = LoadImage(image_only=True, ensure_channel_first=True)(tmp_path / "series")
    empty = dicom_segmentation(image * 0, tmp_path / "series", ["background", "one"], "1.2.3")
    assert not empty.pixel_array.any()
    with pytest.raises(ValueError, match="no class has a name"):
        dicom_segmentation(image * 0, tmp_path / "series", ["background"], "1.2.3")
    with pytest.raises(ValueError, match="are not those of"):
        dicom_segmentation(image[:, 1:], tmp_path / "series", ["background", "one"], "1.2.3")


def in_plane(slice_: pydicom.Dataset, length: float) -> list[float]:
    """Along the slice's rows, in patient space."""
    return [length * float(x) for x in slice_.ImageOrientationPatient[:3]]


def spoil(kind: str, folder: Path, files: list[Path]) -> None:
    if kind == "missing":
        files[4].unlink()
    elif kind == "single":
        for file in files[1:]:
            file.unlink()
    elif kind == "stray":
        (folder / "report.pdf").write_bytes(b"%PDF" + bytes(200))
    elif kind == "folder":
        (folder / "previews").mkdir()
    else:
        changed = pydicom.dcmread(files[3])
        if kind == "other series":
            changed.SeriesInstanceUID = pydicom.uid.generate_uid()
        elif kind == "order":
            changed.InstanceNumber = 99
        elif kind == "empty number":
            changed.InstanceNumber = None
        elif kind == "size":
            changed.Rows = 5
        elif kind == "spacing":
            changed.PixelSpacing = [3.0, 3.0]
        elif kind == "no spacing":
            del changed.PixelSpacing
        elif kind == "no position":
            changed.ImagePositionPatient = None
        elif kind == "moved":
            changed.ImagePositionPatient = [
                x + y for x, y in zip(changed.ImagePositionPatient, in_plane(changed, 40.0))
            ]
        elif kind == "two volumes":
            changed.ImagePositionPatient = pydicom.dcmread(files[4]).ImagePositionPatient
        changed.save_as(files[3])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"missing or out of order, 5\.00 mm lie between numbers 4 and 6, 2\.50 mm elsewhere"),
        ("order", "missing or out of order"),
        ("single", "a single slice"),
        ("stray", r"report\.pdf is no DICOM file"),
        ("folder", "holds a folder, previews, besides slices"),
        ("other series", "holds 2 DICOM series"),
        ("size", "differ in their size, spacing or orientation"),
        ("spacing", "differ in their size, spacing or orientation"),
        ("no spacing", "has no PixelSpacing"),
        ("empty number", "has no InstanceNumber"),
        ("no position", "has no ImagePositionPatient"),
        ("two volumes", "several volumes of one place"),
        ("moved", r"do not lie in one line, number 4 lies 40\.00 mm beside"),
    ],
)
def test_faults_of_a_series_are_named(kind, message, tmp_path):
    files = write_series(tmp_path / "series", volume(), affine_of("oblique"))
    check_series(tmp_path / "series")
    spoil(kind, tmp_path / "series", files)
    with pytest.raises(ValueError, match=message) as error:
        image_list(tmp_path / "series")
    assert str(tmp_path / "series") in str(error.value)


def test_a_tilted_gantry_is_no_fault(tmp_path):
    for k, file in enumerate(write_series(tmp_path / "series", volume(), affine_of("axial"))):
        slice_ = pydicom.dcmread(file)
        slice_.ImagePositionPatient = [x + k * y for x, y in zip(slice_.ImagePositionPatient, in_plane(slice_, 1.0))]
        slice_.save_as(file)
    check_series(tmp_path / "series")


def test_orientations_may_be_rounded(tmp_path):
    for k, file in enumerate(write_series(tmp_path / "series", volume(), affine_of("oblique"))):
        slice_ = pydicom.dcmread(file)
        slice_.ImageOrientationPatient = [float(x) + 1e-6 * k for x in slice_.ImageOrientationPatient]
        slice_.save_as(file)
    check_series(tmp_path / "series")
