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

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

from scripts.benchmark.memory import WIDTHS, step_bytes
from scripts.phantom import write_phantoms
from scripts.plan import Statistics, analyze, plan, task_overlay
from tests.conftest import BUNDLE_ROOT

MEMORY = json.loads((BUNDLE_ROOT / "docs" / "benchmarks" / "memory.json").read_text())


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """CT-like, with slices of 6 mm."""
    return Path(write_phantoms(tmp_path_factory.mktemp("plan") / "data", num_training=4, num_test=1, seed=8))


def statistics(**changes) -> Statistics:
    """Of a CT data set of 20 cases with voxels of 1 mm."""
    cases = 20
    found = Statistics(
        class_names=["background", "liver"],
        channels=["CT"],
        cases=cases,
        groups=cases,
        spacing=np.ones((cases, 3)),
        shape=np.full((cases, 3), 200),
        cropped_shape=np.full((cases, 3), 200),
        zeros=0.0,
        intensity=[(-100.4, 300.6)],
    )
    return replace(found, **changes)


def step_gb(found: dict, classes: int = 2) -> float:
    """What the model of the memory says of a planned step."""
    (name,) = (name for name, width in WIDTHS.items() if width["channels"] == found["channels"])
    voxels = found["batch_size"] * np.prod(found["patch_size"]) * 2 ** found["stem_stride"].count(1)
    return step_bytes(MEMORY["widths"][name], voxels, classes) / 1e9


def planned(memory_gb: float = 8.0, **changes) -> dict:
    return yaml.safe_load(task_overlay(statistics(**changes), "data", memory_gb))


def test_statistics_are_those_of_the_images(phantoms):
    found = analyze(phantoms)
    images = [nib.as_closest_canonical(nib.load(file)) for file in sorted((phantoms / "imagesTr").iterdir())]
    assert found.cases == found.groups == len(images) == 4
    assert np.allclose(found.spacing, [image.header.get_zooms() for image in images], atol=1e-4)
    assert np.array_equal(found.shape, [image.shape for image in images])
    labels = [nib.as_closest_canonical(nib.load(file)) for file in sorted((phantoms / "labelsTr").iterdir())]
    inside = [image.get_fdata()[label.get_fdata() > 0] for image, label in zip(images, labels)]
    expected = np.mean([np.percentile(values, [0.5, 99.5]) for values in inside], axis=0)
    assert found.intensity[0] == pytest.approx(expected, abs=5)


def test_cases_without_foreground_do_not_move_the_window(phantoms, tmp_path):
    shutil.copytree(phantoms, tmp_path / "data")
    label = sorted((tmp_path / "data" / "labelsTr").iterdir())[0]
    volume = nib.load(label)
    nib.save(nib.Nifti1Image(np.zeros(volume.shape, np.uint8), volume.affine), label)
    content = json.loads((tmp_path / "data" / "dataset.json").read_text())
    for case in content["training"][:2]:
        case["group"] = "twins"
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(content))
    found = analyze(tmp_path / "data")
    assert (found.cases, found.groups) == (4, 3)
    low, high = found.intensity[0]
    expected = analyze(phantoms).intensity[0]
    assert (low, high) == pytest.approx(expected, abs=0.2 * (expected[1] - expected[0]))
    assert abs(low) > 1  # the empty one would pull both to 0


def test_training_with_the_plan_needs_no_edit(phantoms, tmp_path, run_bundle, workflow):
    overlay = tmp_path / "mine.yaml"
    command = [sys.executable, "-m", "scripts.plan", "--dataset_dir", str(phantoms), "--output", str(overlay)]
    result = subprocess.run([*command, "--memory_gb", "0.7"], cwd=BUNDLE_ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    content = yaml.safe_load(overlay.read_text())
    assert content["channels"] == WIDTHS["compact"]["channels"] and content["num_folds"] == 4
    assert all("#" in line for line in overlay.read_text().splitlines() if line.startswith(("patch", "spac", "batch")))
    settings = {"ckpt_dir": str(tmp_path / "models"), "output_dir": str(tmp_path / "out"), "device": "cpu"}
    run = run_bundle(["train", str(overlay)], **settings, max_epochs=1, pictures=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    workflow(["inference", str(overlay)], "inference", **settings, pictures=False).run()
    assert len(list((tmp_path / "out").glob("*_seg.nii.gz"))) == 1
    with pytest.raises(ValueError, match="exists"):
        plan(str(phantoms), str(overlay))
    assert yaml.safe_load(overlay.read_text()) == content


def test_intensities():
    window = planned()["intensity"]
    assert (window["a_min"], window["a_max"], window["clip"]) == (-100, 301, True)
    whole = planned(channels=["T1", "FLAIR"], intensity=[(0, 1), (0, 1)])
    assert whole["intensity"]["nonzero"] is False and "foreground_crop" not in whole and whole["in_channels"] == 2
    stripped = planned(channels=["T1"], cropped_shape=np.full((20, 3), 150), zeros=0.6)
    assert stripped["intensity"]["nonzero"] is True and stripped["foreground_crop"]["source_key"] == "image"
    assert max(stripped["patch_size"]) <= 152  # of what is left after cropping
    normalised = planned(channels=["T1"], cropped_shape=np.full((20, 3), 150))  # what lies around is below 0, not 0
    assert normalised["intensity"]["nonzero"] is False and "foreground_crop" not in normalised
    scaled = planned(intensity=[(0.0123, 1.0)])["intensity"]
    assert (scaled["a_min"], scaled["a_max"]) == (0.012, 1.0)


@pytest.mark.parametrize("zero", [True, False])
def test_what_lies_around_the_object_is_looked_at(phantoms, tmp_path, zero):
    shutil.copytree(phantoms, tmp_path / "data")
    for file in (tmp_path / "data" / "imagesTr").iterdir():
        image = nib.load(file)
        values = np.full(image.shape, 0.0 if zero else -0.8, np.float32)
        values[8:-8, 8:-8, 8:-8] = 1.0
        nib.save(nib.Nifti1Image(values, image.affine), file)
    content = json.loads((tmp_path / "data" / "dataset.json").read_text())
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({**content, "modality": {"0": "T1"}}))
    found = analyze(tmp_path / "data")
    assert found.is_zero_outside is zero
    assert np.array_equal(found.cropped_shape, found.shape - 16)


@pytest.mark.parametrize(
    "names",
    [["left kidney", "right kidney"], ["kidney_L"], ["lh-hippocampus"], ["Right_Lung"], ["kidneyLeft"], ["Lt kidney"]],
)
def test_sides_are_not_mirrored(names):
    found = planned(class_names=["background", *names])
    assert found["mirror_axes"] == [] and found["flip_prob"] == 0


def test_other_classes_are_mirrored():
    for name in ("liver", "leftover", "bright spot", "vertebrae_L1", "T2"):
        assert planned(class_names=["background", name])["mirror_axes"] == [0]


def test_anisotropic_spacing():
    spacing = np.tile([0.8, 0.8, 5.0], (20, 1))
    spacing[:4, 2] = 3.0  # the 10th percentile
    found = planned(spacing=spacing, shape=np.tile([400, 400, 40], (20, 1)))
    assert found["spacing"] == pytest.approx([0.8, 0.8, 3.0]) and found["stem_stride"] == [2, 2, 1]
    patch = np.array(found["patch_size"])
    assert patch[2] * 3.0 == pytest.approx(patch[0] * 0.8, rel=0.7)  # no flat patch
    assert found["rotate_axes"] == [2] and "rotate_axes" not in planned()
    assert planned()["stem_stride"] == [2, 2, 2]
    spacing[:4, 2] = 0.5  # some volumes of thin slices: the others are not blown up below the spacing in the slices
    thin = planned(spacing=spacing, shape=np.tile([400, 400, 40], (20, 1)))
    assert thin["spacing"] == pytest.approx([0.8, 0.8, 0.8]) and thin["stem_stride"] == [2, 2, 2]
    assert planned(spacing=np.tile([1.0, 2.0, 1.0], (20, 1)))["stem_stride"] == [2, 1, 2]


@pytest.mark.parametrize("gigabytes", [1, 2, 4, 8, 16, 48])
def test_a_step_fits_into_the_memory(gigabytes):
    organs = ["background", *(f"organ {k}" for k in range(104))]
    for changes in ({}, {"class_names": organs}, {"spacing": np.tile([1.0, 1.0, 4.0], (20, 1))}):
        found = planned(gigabytes, **changes)
        assert step_gb(found, len(changes.get("class_names", "ab"))) <= gigabytes
        assert min(found["patch_size"]) >= 16 and all(size % 8 == 0 for size in found["patch_size"])
    few, many = planned(gigabytes), planned(gigabytes, class_names=organs)
    if few["channels"] == many["channels"] and np.prod(few["patch_size"]) < 200**3:  # the whole image does not fit
        assert many["batch_size"] * np.prod(many["patch_size"]) < few["batch_size"] * np.prod(few["patch_size"])


def test_more_memory_takes_more(phantoms):
    sizes = [planned(gb) for gb in (1, 4, 48)]
    voxels = [s["batch_size"] * np.prod(s["patch_size"]) * s["channels"][0] for s in sizes]
    assert voxels == sorted(voxels) and voxels[0] < voxels[2]
    assert sizes[0]["channels"][0] == 16 and sizes[2]["channels"][0] == 48
    large = planned(48, shape=np.full((20, 3), 600))  # half the image does not fit, a usual patch does
    assert large["channels"][0] == 48 and np.prod(large["patch_size"]) >= 96**3


def test_the_measured_memory_is_within_the_model():
    for width in MEMORY["widths"].values():
        for point in width["points"]:
            line = step_bytes(width, point["side"] ** 3, point["classes"]) / 2**20
            assert point["mib"] <= line <= 1.6 * point["mib"]
    assert set(MEMORY["widths"]) == set(WIDTHS)


def test_small_images_and_few_cases():
    found = planned(cases=3, groups=3, shape=np.full((3, 3), 20), spacing=np.ones((3, 3)))
    assert found["patch_size"] == [24, 24, 24] and found["batch_size"] == found["num_folds"] == 3
    assert planned(groups=4)["num_folds"] == 4


def test_what_cannot_be_planned_is_one_clear_error(phantoms, tmp_path):
    with pytest.raises(ValueError, match="memory_gb=0.1 is too little: the smallest patch takes"):
        planned(0.1)
    with pytest.raises(ValueError, match="one labelled case"):
        planned(cases=1, groups=1, shape=np.full((1, 3), 20), spacing=np.ones((1, 3)))
    with pytest.raises(ValueError, match="one group of labelled cases"):
        planned(groups=1)
    with pytest.raises(ValueError, match="ends in .yaml"):
        plan(str(phantoms), str(tmp_path / "mine.json"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        plan(str(tmp_path / "nowhere"), str(tmp_path / "mine.yaml"))
    broken = tmp_path / "broken"
    shutil.copytree(phantoms, broken)
    label = next((broken / "labelsTr").iterdir())
    volume = nib.load(label)
    nib.save(nib.Nifti1Image(np.full(volume.shape, 9, np.uint8), volume.affine), label)
    with pytest.raises(ValueError, match=label.name):
        plan(str(broken), str(tmp_path / "mine.yaml"))
    assert not (tmp_path / "mine.yaml").exists()


def test_the_keys_are_those_of_the_configs():
    config = json.loads((BUNDLE_ROOT / "configs" / "train.json").read_text())
    everything = task_overlay(statistics(channels=["T1"], cropped_shape=np.full((20, 3), 90), zeros=0.9), "data", 8)
    assert set(yaml.safe_load(everything)) - {"_meta_"} <= set(config)


def test_what_a_release_says_of_the_data():
    said = {"name": "Livers", "reference": "a paper: theirs", "licence": "CC-BY 4.0"}
    meta = planned(described=said)["_meta_"]
    assert (meta["title"], meta["data_source"]) == ("Livers", "Livers, a paper: theirs")
    assert (meta["modality"], meta["data_license"]) == ("CT", "CC-BY 4.0")
    meta = planned(channels=["T1w", "FLAIR"], intensity=[(0, 1), (0, 1)])["_meta_"]
    assert (meta["title"], meta["modality"], meta["channel_names"]) == ("data", "MR", ["T1w", "FLAIR"])
    assert planned(channels=["PET"])["_meta_"]["modality"] == "n/a"
