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

"""Tests of the synthetic data set: what is written, that it can be relied on, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from scripts import phantom
from scripts.data_check import check_dataset
from scripts.datalist import dataset_channels, dataset_classes, load_datalist
from scripts.phantom import write_phantoms
from scripts.phantom_volume import PHANTOM_CLASSES, make_phantom

ROOT = Path(__file__).resolve().parents[1]
GRID = {"spatial_size": (64, 60, 66), "spacing": (2.5, 2.5, 2.5)}


def centroids_mm(label: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Centre of mass of each labelled class in patient space, shape (classes, 3)."""
    return np.array(
        [affine[:3, :3] @ np.argwhere(label == k).mean(0) + affine[:3, 3] for k in range(1, label.max() + 1)]
    )


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Five training cases and one test case, one of each kind of grid."""
    return Path(write_phantoms(tmp_path_factory.mktemp("phantom") / "data", num_training=5, num_test=1, seed=3))


def test_written_folder_is_a_decathlon_data_set_fit_for_training(small):
    items = load_datalist(small, "all")
    assert len(items) == 5 and check_dataset(items, num_classes=5, num_channels=1, progress=False).startswith("5 cases")
    test_items = load_datalist(small, "test")
    assert len(test_items) == 1 and Path(test_items[0]["label"]).parent.name == "labelsTs"
    check_dataset(test_items, num_classes=5, num_channels=1, progress=False)
    assert dataset_channels(small) == 1
    assert dataset_classes(small) == dict(enumerate(PHANTOM_CLASSES[:5]))
    content = json.loads((small / "dataset.json").read_text())
    assert "synthetic" in content["name"] and "Synthetic" in content["description"]
    assert (content["numTraining"], content["numTest"]) == (5, 1)
    assert sorted(p.name for p in small.parent.iterdir()) == ["data"]


def test_files_hold_int16_images_uint8_labels_and_varied_grids(small):
    images = [nib.load(item["image"]) for item in load_datalist(small, "all")]
    labels = [nib.load(item["label"]) for item in load_datalist(small, "all")]
    assert {str(i.get_data_dtype()) for i in images} == {"int16"}
    assert {str(i.get_data_dtype()) for i in labels} == {"uint8"}
    for image, label in zip(images, labels):
        assert np.array_equal(image.affine, label.affine)
        assert np.allclose(image.get_qform(), image.get_sform(), atol=1e-4)
        assert all(56 <= n <= 80 for n in image.shape)
    spacings = np.array([i.header.get_zooms() for i in images])
    assert any(s.max() / s.min() > 1.15 for s in spacings) and any(s.max() / s.min() < 1.01 for s in spacings)
    assert {nib.aff2axcodes(i.affine) for i in images} >= {tuple("RAS"), tuple("LPS"), tuple("PIR")}
    tilted = [bool(nib.affines.obliquity(i.affine).max() > np.deg2rad(3)) for i in images]
    assert any(tilted) and not all(tilted)
    assert any(n % 2 for i in images for n in i.shape)


def test_a_case_depends_on_the_seed_and_its_number_alone(small, tmp_path):
    fewer = file_bytes(Path(write_phantoms(tmp_path / "fewer", num_training=2, num_test=1, seed=3)))
    more = file_bytes(small)
    cases = [name for name in fewer if name != "dataset.json"]
    assert len(cases) == 6 and all(fewer[name] == more[name] for name in cases)
    assert len({more[name] for name in more if name.startswith("images")}) == 6
    other = file_bytes(Path(write_phantoms(tmp_path / "other", num_training=1, num_test=0, seed=4)))
    assert other["labelsTr/phantom_000.nii.gz"] != more["labelsTr/phantom_000.nii.gz"]


def test_every_organ_is_in_every_volume():
    for seed in range(20):
        image, label, _ = make_phantom(seed, num_classes=7)
        counts = np.bincount(label.ravel(), minlength=7)
        assert counts.shape == (7,) and counts[1:].min() >= 80, f"seed {seed}: {counts}"
        assert counts[1:5].min() >= 300, f"seed {seed}: {counts}"
        for value in (1, 2, 3, 4):
            contrast = image[label == value].mean() - 35.0
            assert contrast > 40, f"seed {seed}: {PHANTOM_CLASSES[value]} stands out by {contrast} HU only"


def test_unlabelled_classes_are_still_drawn():
    image, label, affine = make_phantom(5, num_classes=3)
    full_image, full_label, full_affine = make_phantom(5, num_classes=7)
    assert np.array_equal(image, full_image) and np.array_equal(affine, full_affine)
    assert np.array_equal(label, np.where(full_label < 3, full_label, 0))


def test_organs_cannot_be_told_apart_by_intensity():
    ahead = {"spleen": set(), "vessel": set()}
    for seed in range(12):
        image, label, _ = make_phantom(seed)
        mean = [image[label == k].mean() for k in range(5)]
        ahead["spleen"].add(bool(mean[2] > mean[1]))
        ahead["vessel"].add(bool(mean[4] > mean[3]))
        enhanced = image[label == 3].mean()
        background = image[(label == 0) & (abs(image - enhanced) < 25)].size
        assert background > 300, f"seed {seed}: {background} background voxels look like the kidneys"
    assert ahead == {"spleen": {True, False}, "vessel": {True, False}}


def test_edges_are_blended_and_values_are_hounsfield_like():
    image, label, _ = make_phantom(1)
    assert image.dtype == np.int16 and label.dtype == np.uint8
    assert image.min() >= -1024 and -1010 < np.median(image[:2]) < -990
    blended = ((image > -800) & (image < -300)).sum()  # far from both air and fat for the noise to reach
    assert blended > 1000


def test_noise_is_correlated():
    image, _, _ = make_phantom(1, **GRID, orientation="RAS", oblique=False)
    air = image[:4, :4].astype(float) + 1000.0
    neighbours = np.corrcoef(air[..., 1:].ravel(), air[..., :-1].ravel())[0, 1]
    assert 0.4 < neighbours < 0.9
    assert 5 < air.std() < 25


@pytest.mark.parametrize("grid", [{"orientation": "LPS"}, {"orientation": "PIR"}, {"oblique": True}])
def test_the_scene_stays_where_it_is_in_patient_space(grid):
    kept = {"orientation": "RAS", "oblique": False, "spatial_size": (72, 72, 72), "spacing": (2.5, 2.5, 2.5)}
    _, label, affine = make_phantom(8, **kept)
    _, other, other_affine = make_phantom(8, **{**kept, **grid})
    assert not np.allclose(affine, other_affine)
    tolerance = 1.5 if "oblique" in grid else 0.01  # a tilted grid samples other points: below a voxel of 2.5 mm
    assert np.abs(centroids_mm(label, affine) - centroids_mm(other, other_affine)).max() < tolerance
    assert not np.array_equal(label, other)
    assert centroids_mm(label, affine)[0, 0] > 15  # the liver-like organ lies on the patient's right, +x in RAS
    if "orientation" in grid:
        assert nib.aff2axcodes(other_affine) == tuple(grid["orientation"])
    else:
        assert nib.affines.obliquity(other_affine).max() > np.deg2rad(3)


def test_asked_size_and_spacing_are_kept():
    image, label, affine = make_phantom(2, spatial_size=(31, 40, 29), spacing=(4.0, 3.0, 5.0), oblique=True)
    assert image.shape == label.shape == (31, 40, 29)
    assert np.allclose(nib.affines.voxel_sizes(affine), (4.0, 3.0, 5.0))


def test_a_second_call_finds_the_work_done(small, caplog):
    before = {f: f.stat().st_mtime_ns for f in small.rglob("*")}
    with caplog.at_level("INFO"):
        assert write_phantoms(small, num_training=5, num_test=1, seed=3) == str(small)
    assert "already holds these phantoms" in caplog.text
    assert {f: f.stat().st_mtime_ns for f in small.rglob("*")} == before


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    write_phantoms(tmp_path / "empty", num_training=1, num_test=0)
    assert (tmp_path / "empty" / "labelsTr" / "phantom_000.nii.gz").is_file()


@pytest.mark.parametrize("content", ["notes.txt", "dataset.json"])
def test_a_folder_with_other_content_is_left_alone(tmp_path, content):
    (tmp_path / content).write_text('{"name": "mine"}')
    with pytest.raises(FileExistsError, match="holds no phantom data set"):
        write_phantoms(tmp_path, num_training=1, num_test=0)
    assert [p.name for p in tmp_path.iterdir()] == [content]


@pytest.mark.parametrize("change", [{"num_training": 2}, {"num_test": 1}, {"seed": 1}, {"num_classes": 4}])
def test_phantoms_of_other_arguments_are_left_alone(tmp_path, change):
    arguments = {"num_training": 1, "num_test": 0, "seed": 0, "num_classes": 5}
    write_phantoms(tmp_path / "data", **arguments)
    before = file_bytes(tmp_path)
    with pytest.raises(FileExistsError, match="other arguments"):
        write_phantoms(tmp_path / "data", **{**arguments, **change})
    assert file_bytes(tmp_path) == before


def test_a_data_set_that_lost_a_file_is_not_called_complete(tmp_path):
    write_phantoms(tmp_path / "data", num_training=1, num_test=1)
    (tmp_path / "data" / "labelsTs" / "phantom_test_000.nii.gz").unlink()
    with pytest.raises(FileExistsError, match=r"lacks 1 of its 4 files, \./labelsTs/phantom_test_000"):
        write_phantoms(tmp_path / "data", num_training=1, num_test=1)


def test_an_interrupted_run_leaves_nothing_behind(tmp_path, monkeypatch):
    written = []

    def save_then_break(array, affine, path):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        path.write_bytes(b"")

    monkeypatch.setattr(phantom, "_save_nifti", save_then_break)
    with pytest.raises(KeyboardInterrupt):
        write_phantoms(tmp_path / "data", num_training=3, num_test=0)
    assert len(written) == 3 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_training": 0}, "num_training"),
        ({"num_training": "many"}, "num_training"),
        ({"num_test": -1}, "num_test"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"num_classes": 1}, "num_classes"),
        ({"num_classes": 8}, "num_classes"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_phantoms(tmp_path / "data", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"orientation": "RAR"}, "orientation"),
        ({"orientation": "RAX"}, "orientation"),
        ({"spacing": (1.0, 0.0, 1.0)}, "spacing"),
        ({"spatial_size": (8, 8)}, "spatial_size"),
        ({"num_classes": 8}, "num_classes"),
    ],
)
def test_bad_arguments_of_one_volume_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_phantom(0, **arguments)


def test_command_line_writes_and_refuses_unknown_options(tmp_path):
    command = [sys.executable, "-m", "scripts.phantom", "--output_dir", str(tmp_path / "data"), "--num_test", "0"]
    typo = subprocess.run([*command, "--num_trainings", "1"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert typo.returncode != 0 and "num_trainings" in typo.stderr
    assert list(tmp_path.iterdir()) == []
    done = subprocess.run([*command, "--num_training", "1"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(load_datalist(tmp_path / "data", "all")) == 1
