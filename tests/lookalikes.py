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
"""Folders that look like data sets as they are handed out, with small volumes of boxes in noise; DICOM series."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np

__all__ = ["TASK_TREES", "make_tree", "write_series"]


def _volume(
    path: Path, seed: int, labels: list[int], size, spacing, channels: int = 0, label: Path | None = None
) -> None:
    """An image, and its label, in which each value is a box that the next ones partly cover."""
    rng = np.random.default_rng(seed)
    values = np.zeros(size, np.uint8)
    for k, value in enumerate(labels):
        start = [min(s - 2, 1 + (k * (1 + axis)) % max(1, s // 2)) for axis, s in enumerate(size)]
        values[tuple(slice(a, max(a + 2, a + s // 2)) for a, s in zip(start, size))] = value
    shape = (*size, channels) if channels else size
    image = rng.normal(40, 20, shape) + 60 * (values[..., None] if channels else values)
    affine = np.diag([*spacing, 1.0])
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(image.astype(np.float32), affine), path)
    if label is not None:
        label.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(values, affine), label)


def _decathlon(folder: Path, modality: list[str], names: list[str], size, spacing) -> None:
    training = []
    for k in range(4):
        image, label = folder / "imagesTr" / f"case_{k:03}.nii.gz", folder / "labelsTr" / f"case_{k:03}.nii.gz"
        channels = len(modality) if len(modality) > 1 else 0
        _volume(image, k, list(range(1, len(names))), size, spacing, channels, label)
        training.append({"image": f"./imagesTr/{image.name}", "label": f"./labelsTr/{label.name}"})
    _volume(folder / "imagesTs" / "case_100.nii.gz", 9, [], size, spacing, len(modality) if len(modality) > 1 else 0)
    content = {
        "modality": {str(k): name for k, name in enumerate(modality)},
        "labels": {str(k): name for k, name in enumerate(names)},
        "training": training,
        "test": ["./imagesTs/case_100.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(content))


def _brats21(folder: Path) -> None:
    for k in range(5):
        name = f"BraTS2021_{k:05}"
        case = folder / name
        for c, kind in enumerate(("flair", "t1", "t1ce", "t2")):
            label = case / f"{name}_seg.nii.gz" if c == 0 else None
            _volume(case / f"{name}_{kind}.nii.gz", 10 * k + c, [2, 1, 4], (24, 24, 16), (1, 1, 1), label=label)


def _btcv(folder: Path) -> None:
    labelled = ["0001", "0002", "0003", "0004", "0005", "0006", "0008", "0022", "0025", "0029", "0032"]
    labelled += ["0034", "0035", "0036", "0037", "0038", "0039", "0040"]
    for k, number in enumerate(labelled):
        training = folder / "RawData" / "Training"
        image, label = training / "img" / f"img{number}.nii.gz", training / "label" / f"label{number}.nii.gz"
        _volume(image, k, list(range(1, 14)), (24, 22, 12), (1.5, 1.5, 4), label=label)
    _volume(folder / "RawData" / "Testing" / "img" / "img0061.nii.gz", 61, [], (24, 22, 12), (1.5, 1.5, 4))


def _acdc(folder: Path) -> None:
    for k in range(1, 5):
        for frame in (1, 12):
            stem = folder / ("training" if k < 4 else "testing") / f"patient{k:03}" / f"patient{k:03}_frame{frame:02}"
            label = stem.with_name(f"{stem.name}_gt.nii.gz")
            _volume(stem.with_name(f"{stem.name}.nii.gz"), k, [1, 2, 3], (24, 22, 8), (1.5, 1.5, 8), label=label)
        _volume(stem.with_name(f"patient{k:03}_4d.nii.gz"), k, [], (24, 22, 8), (1.5, 1.5, 8), channels=2)
        (stem.parent / "Info.cfg").write_text("ED: 1\nES: 12\n")


TASK_TREES = {
    "hippocampus": lambda f: _decathlon(f, ["MRI"], ["background", "Anterior", "Posterior"], (20, 24, 18), (1, 1, 1)),
    "spleen": lambda f: _decathlon(f, ["CT"], ["background", "spleen"], (24, 22, 12), (1, 1, 4)),
    "brain_tumour": lambda f: _decathlon(
        f,
        ["FLAIR", "T1w", "t1gd", "T2w"],
        ["background", "edema", "non-enhancing tumor", "enhancing tumour"],
        (24, 24, 16),
        (1, 1, 1),
    ),
    "brats21": _brats21,
    "btcv": _btcv,
    "synapse": _btcv,
    "acdc": _acdc,
}


def make_tree(task: str, folder: Path) -> Path:
    """Write the folder of a task, by the name of its overlay."""
    TASK_TREES[task](folder)
    return folder


def write_series(folder: Path, volume: np.ndarray, affine: np.ndarray, numbers: list[int] | None = None) -> list[Path]:
    """
    A CT series of an (I, J, K) volume of whole numbers: a slice for each k, rows along j, columns along i, ``affine``
    from voxels to RAS.
    """
    import pydicom  # here, as whoever has none collects the other tests all the same
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    folder.mkdir(parents=True)
    lps = np.diag([-1, -1, 1, 1]) @ affine
    step = np.linalg.norm(lps[:3, :3], axis=0)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    files = []
    for k in range(volume.shape[2]):
        meta = pydicom.dataset.FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        slice_ = pydicom.Dataset()
        slice_.file_meta = meta
        slice_.SOPClassUID, slice_.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        slice_.StudyInstanceUID, slice_.SeriesInstanceUID, slice_.FrameOfReferenceUID = study, series, frame
        slice_.Modality, slice_.PatientName, slice_.PatientID = "CT", "Phantom", "0"
        slice_.InstanceNumber = numbers[k] if numbers else k + 1
        slice_.ImagePositionPatient = [float(f"{x:.6g}") for x in lps[:3, 3] + k * lps[:3, 2]]
        slice_.ImageOrientationPatient = [float(f"{x:.9g}") for x in (*(lps[:3, 0] / step[0]), *(lps[:3, 1] / step[1]))]
        slice_.PixelSpacing = [step[1], step[0]]  # between rows, between columns
        slice_.SliceThickness = step[2]
        slice_.Rows, slice_.Columns = volume.shape[1], volume.shape[0]
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 16, 15, 0
        slice_.RescaleIntercept, slice_.RescaleSlope = -1024, 1
        slice_.PixelData = (volume[:, :, k].T + 1024).astype(np.uint16).tobytes()
        files.append(folder / f"slice_{389 * k % 997:03d}.dcm")  # names tell nothing of the order
        slice_.save_as(files[-1], enforce_file_format=True)
    return files
