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
"""The bundle as an application of MONAI Deploy, run as a process, against the bundle run by MONAI itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.conftest import BUNDLE_ROOT
from tests.lookalikes import write_series
from tests.test_datalist import HIPPOCAMPUS

DEPLOY_VENV = Path(os.environ.get("SEGRESMAMBA_DEPLOY_VENV", "")).absolute()
NAMES = ["anterior", "posterior"]

pytestmark = pytest.mark.skipif("SEGRESMAMBA_DEPLOY_VENV" not in os.environ, reason="no MONAI Deploy: make deploy-test")
pydicom, highdicom = (pytest.importorskip(name) for name in ("pydicom", "highdicom"))


def python(*command: str | os.PathLike) -> subprocess.CompletedProcess:
    """In the virtual environment of the SDK."""
    return subprocess.run(
        [DEPLOY_VENV / "bin" / "python", *command],
        cwd=BUNDLE_ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def hippocampus(kind: str) -> tuple[np.ndarray, np.ndarray, list[int] | None]:
    """A real volume as it is, or cut into every second sagittal slice, numbered backwards, and turned."""
    assert HIPPOCAMPUS.is_dir(), f"no {HIPPOCAMPUS}: set SEGRESMAMBA_DATA to the folder that holds Task04_Hippocampus"
    image = nib.load(HIPPOCAMPUS / "imagesTr" / "hippocampus_001.nii.gz")
    values, affine = np.asarray(image.dataobj).astype(int), image.affine
    if kind == "plain":
        return values, affine, None
    c, s = np.cos(0.3), np.sin(0.3)
    turned = np.array([[c, -s, 0, 7], [s, c, 0, -11], [0, 0, 1, 3], [0, 0, 0, 1]])
    sagittal = np.array([[0, 0, 2, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])  # 2 mm from slice to slice
    values = values.transpose(1, 2, 0)[:, :, ::2]
    return values, turned @ affine @ sagittal, list(range(values.shape[2], 0, -1))


@pytest.mark.parametrize("kind", ["plain", "turned"])
def test_it_segments_as_the_bundle_does(kind, run_bundle, tmp_path):
    series, output = tmp_path / "series", tmp_path / "output"
    slices = [pydicom.dcmread(file) for file in write_series(series, *hippocampus(kind))]
    run = python("-m", "scripts.deploy_app", "--input", series, "--output", output)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    (file,) = output.iterdir()
    found = highdicom.seg.segread(file)
    assert file.stem == found.SOPInstanceUID and found.Modality == "SEG"
    segments = [found.get_segment_description(number) for number in found.segment_numbers]
    assert [segment.segment_label for segment in segments] == NAMES
    (algorithm,) = segments[0].SegmentationAlgorithmIdentificationSequence
    version = json.loads((BUNDLE_ROOT / "configs" / "metadata.json").read_text())["version"]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("SegResMamba", version)
    assert "research only" in found.ContentDescription
    for tag in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName"):
        assert found[tag].value == slices[0][tag].value
    (referred,) = found.ReferencedSeriesSequence
    assert referred.SeriesInstanceUID == slices[0].SeriesInstanceUID
    uids = [header.SOPInstanceUID for header in slices]
    assert {item.ReferencedSOPInstanceUID for item in referred.ReferencedInstanceSequence} == set(uids)

    run = run_bundle(["inference"], input=series, output_dir=tmp_path / "eval", pictures=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    theirs = highdicom.seg.segread(tmp_path / "eval" / "series_seg.dcm")
    label = np.asarray(nib.load(tmp_path / "eval" / "series_seg.nii.gz").dataobj)
    options = {"combine_segments": True, "assert_missing_frames_are_empty": True}  # slices without a segment
    planes, expected = (seg.get_pixels_by_source_instance(uids, **options) for seg in (found, theirs))
    np.testing.assert_array_equal(planes, expected)
    assert all(np.sum(planes == value) == np.sum(label == value) > 500 for value in (1, 2))


def test_faults_of_the_input_are_named(tmp_path):
    values, affine, _ = hippocampus("plain")
    (tmp_path / "empty").mkdir()
    for name in ("two/one", "two/other"):
        write_series(tmp_path / name, values, affine)
    write_series(tmp_path / "oblong", values, affine @ np.diag([1, 1.5, 1, 1]))
    for file in write_series(tmp_path / "gap", values, affine)[4:6]:
        file.unlink()
    messages = {
        "absent": "There is no folder",
        "empty": "holds no DICOM series",
        "two": "holds 2 DICOM series",
        "oblong": "its pixels are not square",
        "gap": "slices are missing",
    }
    program = "import sys\nfrom scripts.deploy_app import one_series\nfor name in sys.argv[1:]:\n    try:\n"
    program += "        one_series(name)\n    except (FileNotFoundError, ValueError) as error:\n        print(error)"
    said = python("-c", program, *(tmp_path / name for name in messages)).stdout.splitlines()[-len(messages) :]
    for line, (name, message) in zip(said, messages.items(), strict=True):
        assert message in line and str(tmp_path / name) in line


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({}, "There are no weights"),
        ({"in_channels": 4}, "images of several channels"),
        ({"checkpoint": "other.pt"}, "its checkpoint is other.pt"),
    ],
)
def test_a_bundle_that_does_not_fit_ends_in_one_line(overrides, message, tmp_path):
    values, affine, _ = hippocampus("plain")
    write_series(tmp_path / "series", values, affine)
    shutil.copytree(BUNDLE_ROOT / "configs", tmp_path / "bundle" / "configs")
    config = tmp_path / "bundle" / "configs" / "inference.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | overrides))
    command = ["--input", tmp_path / "series", "--output", tmp_path / "output", "--model", tmp_path / "bundle"]
    run = python("-m", "scripts.deploy_app", *command)
    assert run.returncode == 1 and message in run.stderr.splitlines()[-1] and "Traceback" not in run.stderr
    assert not list((tmp_path / "output").iterdir())
