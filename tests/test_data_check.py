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

"""Tests of the check of a data set before training."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from scripts.data_check import check_dataset
from scripts.datalist import dataset_channels, dataset_classes, load_datalist
from tests.test_datalist import (
    HIPPOCAMPUS,
    OPENMS,
    SHAPE,
    needs_hippocampus,
    needs_openms,
    save,
    write_dataset,
)


@pytest.fixture
def dataset(tmp_path) -> Path:
    return write_dataset(tmp_path / "set")


def truncate(path: str) -> None:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])


def nan_voxel(path: str) -> None:
    array = np.ones(SHAPE, np.float32)
    array[1, 1, 1] = np.nan
    save(array, path)


def with_value(value: float, dtype: type):
    def change(path: str) -> None:
        array = np.ones(SHAPE, dtype)
        array[1, 2, 3] = value
        save(array, path)

    return change


FAULTS = {
    "missing image": ("image", os.remove, "the image file does not exist"),
    "missing label": ("label", os.remove, "the label file does not exist"),
    "truncated image": ("image", truncate, "cannot be read as an image"),
    "truncated label": ("label", truncate, "cannot be read as an image"),
    "text": ("image", lambda p: Path(p).write_text("not an image"), "cannot be read as an image"),
    "empty file": ("label", lambda p: Path(p).write_bytes(b""), "cannot be read as an image"),
    "class too high": ("label", with_value(3, np.uint8), r"must be from 0 to 2 \(num_classes=3\), found 3$"),
    "negative class": ("label", with_value(-1, np.int16), "found -1$"),
    "hardly a fraction": ("label", with_value(0.99999994, np.float32), "must be whole numbers, found 0.99999994"),
    "slice": ("image", lambda p: save(np.ones(SHAPE[:2], np.float32), p), "is no volume, but has 2 axes"),
    "fraction": ("label", with_value(0.5, np.float32), "must be whole numbers, found 0.5"),
    "NaN label": ("label", with_value(np.nan, np.float32), "must be whole numbers, found nan"),
    "NaN image": ("image", nan_voxel, "holds NaN or infinite values"),
    "shape": (
        "label",
        lambda p: save(np.ones((9, 8, 6), np.uint8), p),
        r"shape \(9, 8, 6\) differs from .* \(9, 8, 7\)",
    ),
    "channels": ("image", lambda p: save(np.ones((*SHAPE, 2), np.float32), p), "has 2 channels instead of 1"),
    "one-hot label": ("label", lambda p: save(np.ones((*SHAPE, 3), np.uint8), p), "label has 3 channels instead of 1"),
    "label shifted by less than a voxel": (
        "label",
        lambda p: save(np.ones(SHAPE, np.uint8), p, np.eye(4) + 0.8 * np.eye(4, k=3)),
        "0.8 mm away from the image",
    ),
    "shifted label": (
        "label",
        lambda p: save(np.ones(SHAPE, np.uint8), p, np.diag([1, 1, 1.5, 1])),
        "3.0 mm away from the image's: their affines differ$",
    ),
    "label along other axes": (
        "label",
        lambda p: save(np.ones(SHAPE, np.uint8), p, np.diag([-1, -1, 1, 1])),
        "away from the image's: its axes run LPS, the image's RAS$",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported_with_its_file(dataset, name):
    key, spoil, message = FAULTS[name]
    items = load_datalist(dataset, "all")
    check_dataset(items, num_classes=3, num_channels=1, progress=False)
    spoil(items[2][key])
    with pytest.raises(ValueError, match=message) as caught:
        check_dataset(items, num_classes=3, num_channels=1, progress=False)
    lines = str(caught.value).splitlines()
    assert lines[0] == "The data set is unfit: 1 of 6 cases have problems."
    assert len(lines) == 2 and items[2][key] in lines[1]


def test_all_faults_come_in_one_error(dataset):
    items = load_datalist(dataset, "all")
    truncate(items[0]["image"])
    os.remove(items[1]["label"])
    with_value(9, np.uint8)(items[4]["label"])
    with pytest.raises(ValueError, match="3 of 6 cases") as caught:
        check_dataset(items, num_classes=3, progress=False)
    assert all(f in str(caught.value) for f in (items[0]["image"], items[1]["label"], items[4]["label"]))


def test_long_lists_of_faults_are_cut(tmp_path):
    items = load_datalist(write_dataset(tmp_path / "set", num_cases=14), "all")
    with pytest.raises(ValueError, match="14 of 14 cases") as caught:
        check_dataset(items, num_classes=2, progress=False)
    lines = str(caught.value).splitlines()
    assert len(lines) == 12 and lines[-1].strip() == "... and 4 more."


def test_an_absent_folder_is_one_fault(dataset):
    items = load_datalist(dataset, "all")
    (dataset / "labelsTr").rename(dataset / "labels")
    with pytest.raises(ValueError, match=r"labelsTr: the folder does not exist, 6 files were expected") as caught:
        check_dataset(items, num_classes=3, progress=False)
    assert len(str(caught.value).splitlines()) == 2


def test_a_case_without_label_is_named_unless_no_label_is_asked_for(dataset):
    items = load_datalist(dataset, "all")
    del items[3]["label"]
    with pytest.raises(ValueError, match=r"case3.nii.gz\) has no 'label'"):
        check_dataset(items, num_classes=3, progress=False)
    assert "label" not in check_dataset(items, num_classes=3, label_key=None, progress=False)


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match="data list is empty"):
        check_dataset([], num_classes=3)


def test_a_class_that_no_case_has_is_told(dataset):
    items = load_datalist(dataset, "all")
    assert "label values 0, 1, 2 of 0 to 4, 3, 4 in no case" in check_dataset(items, num_classes=5, progress=False)
    assert "in no case" not in check_dataset(items, num_classes=3, progress=False)


def test_values_may_have_gaps(dataset):
    items = load_datalist(dataset, "all")
    with_value(4, np.uint8)(items[0]["label"])
    found = check_dataset(items, num_classes=3, label_values=[0, 1, 2, 4], progress=False)
    assert found.endswith("4 of 0, 1, 2, 4")
    with_value(3, np.uint8)(items[0]["label"])
    with pytest.raises(ValueError, match="must be 0, 1, 2, 4, found 3$"):
        check_dataset(items, num_classes=3, label_values=[0, 1, 2, 4], progress=False)


def test_float_labels_of_whole_numbers_are_fine(dataset):
    items = load_datalist(dataset, "all")
    with_value(2.0, np.float32)(items[0]["label"])
    check_dataset(items, num_classes=3, progress=False)


@pytest.mark.parametrize(("num_channels", "fits"), [(2, True), (None, True), (1, False), (4, False)])
def test_channels_are_counted_over_a_list_of_files(tmp_path, num_channels, fits):
    items = load_datalist(write_dataset(tmp_path / "set", num_cases=2, channels=2), "all")
    if fits:
        check_dataset(items, num_classes=3, num_channels=num_channels, progress=False)
        return
    with pytest.raises(ValueError, match=f"has 2 channels instead of {num_channels}"):
        check_dataset(items, num_classes=3, num_channels=num_channels, progress=False)


def test_a_case_short_of_a_channel_is_named(tmp_path):
    items = load_datalist(write_dataset(tmp_path / "set", num_cases=3, channels=2), "all")
    items[1]["image"].pop()
    with pytest.raises(ValueError, match=r"case1_0000.nii.gz: has 1 channels instead of 2"):
        check_dataset(items, num_classes=3, progress=False)


def test_optional_checks_can_be_left_out(dataset):
    items = load_datalist(dataset, "all")
    nan_voxel(items[0]["image"])
    save(np.ones(SHAPE, np.uint8), items[1]["label"], np.diag([2.0, 2.0, 2.0, 1.0]))
    with pytest.raises(ValueError, match="2 of 6 cases"):
        check_dataset(items, num_classes=3, progress=False)
    check_dataset(items, num_classes=3, check_finite=False, check_affine=False, progress=False)


def test_other_formats_are_read_too(tmp_path):
    rng = np.random.RandomState(0)
    np.save(tmp_path / "image.npy", rng.normal(size=SHAPE))
    np.save(tmp_path / "label.npy", rng.randint(0, 3, SHAPE).astype(np.uint8))
    items = [{"image": str(tmp_path / "image.npy"), "label": str(tmp_path / "label.npy")}]
    check_dataset(items, num_classes=3, num_channels=1, progress=False)
    with pytest.raises(ValueError, match=r"label.npy: label values must be from 0 to 1 .* found 2"):
        check_dataset(items, num_classes=2, progress=False)


def test_progress_bar_counts_cases(dataset, capsys):
    items = load_datalist(dataset, "all")
    check_dataset(items, num_classes=3)
    assert "Checking data" in capsys.readouterr().err
    check_dataset(items, num_classes=3, progress=False)
    assert capsys.readouterr().err == ""


# ---- real data


@needs_hippocampus
def test_hippocampus_is_fit_for_training():
    classes = dataset_classes(HIPPOCAMPUS)
    assert classes == {0: "background", 1: "Anterior", 2: "Posterior"}
    items = load_datalist(HIPPOCAMPUS, "all")
    assert len(items) == 208
    check_dataset(items, num_classes=len(classes), num_channels=dataset_channels(HIPPOCAMPUS), progress=False)
    with pytest.raises(ValueError, match="208 of 208 cases"):
        check_dataset(items, num_classes=2, progress=False)
    train, val = (load_datalist(HIPPOCAMPUS, subset) for subset in ("training", "validation"))
    assert len(train) == 166 and len(val) == 42


@needs_openms
def test_openms_has_four_channels():
    items = load_datalist(OPENMS, "all")
    assert [len(item["image"]) for item in items] == [4, 4] and dataset_channels(OPENMS) == 4
    check_dataset(items[:1], num_classes=len(dataset_classes(OPENMS)), num_channels=4, progress=False)
