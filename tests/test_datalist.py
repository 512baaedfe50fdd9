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

"""Tests of the data lists."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from scripts.data_check import check_dataset
from scripts.datafolder import image_list
from scripts.datalist import cases_digest, dataset_channels, dataset_classes, load_datalist

DATA = Path(os.environ.get("SEGRESMAMBA_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
HIPPOCAMPUS = DATA / "Task04_Hippocampus"
OPENMS = DATA / "OpenMS_MNI"
needs_hippocampus = pytest.mark.skipif(not HIPPOCAMPUS.is_dir(), reason=f"no {HIPPOCAMPUS}: set SEGRESMAMBA_DATA")
needs_openms = pytest.mark.skipif(not OPENMS.is_dir(), reason=f"no {OPENMS}: set SEGRESMAMBA_DATA")
SHAPE = (9, 8, 7)


def save(array: np.ndarray, path: str | Path, affine: np.ndarray | None = None) -> None:
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def write_dataset(folder: Path, num_cases: int = 6, channels: int = 1, num_test: int = 0) -> Path:
    """A data set of tiny noise volumes with label values 0 to 2."""
    rng = np.random.RandomState(0)
    for name in ("imagesTr", "labelsTr", *(["imagesTs", "labelsTs"] if num_test else [])):
        (folder / name).mkdir(parents=True)
    content = {
        "modality": {str(c): f"m{c}" for c in range(channels)},
        "labels": {"0": "background", "1": "a", "2": "b"},
    }
    content.update(training=[], test=[])
    for index in range(num_cases + num_test):
        suffix = "Tr" if index < num_cases else "Ts"
        files = [f"./images{suffix}/case{index}_{c:04d}.nii.gz" for c in range(channels)]
        label = f"./labels{suffix}/case{index}.nii.gz"
        if channels == 1:
            files = [f"./images{suffix}/case{index}.nii.gz"]
        for file in files:
            save(rng.normal(size=SHAPE).astype(np.float32), folder / file)
        save(rng.randint(0, 3, SHAPE).astype(np.uint8), folder / label)
        image = files[0] if channels == 1 else files
        if suffix == "Tr":
            content["training"].append({"image": image, "label": label})
        else:
            content["test"].append(image if channels == 1 else {"image": image})
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def rewrite_json(folder: Path, **changes: object) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    content.update(changes)
    (folder / "dataset.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def names(items: list[dict]) -> list[str]:
    return [Path(item["label"]).name for item in items]


@pytest.fixture
def dataset(tmp_path) -> Path:
    return write_dataset(tmp_path / "set")


# ---- the lists


@pytest.mark.parametrize("num_folds", [2, 4, 5])
def test_folds_are_disjoint_and_cover_all_cases(tmp_path, num_folds):
    folder = write_dataset(tmp_path / "set", num_cases=11)
    everything = names(load_datalist(folder, "all"))
    assert everything == sorted(everything) and len(everything) == 11
    held_out = []
    for fold in range(num_folds):
        train = names(load_datalist(folder, "training", fold=fold, num_folds=num_folds))
        val = names(load_datalist(folder, "validation", fold=fold, num_folds=num_folds))
        assert not set(train) & set(val) and sorted(train + val) == everything
        assert len(val) in (11 // num_folds, 11 // num_folds + 1)
        held_out += val
    assert sorted(held_out) == everything


def test_cases_of_one_patient_stay_together(tmp_path):
    """Numbered patients beside cases that name none, and one that says null."""
    folder = write_dataset(tmp_path / "set", num_cases=11)
    content = json.loads((folder / "dataset.json").read_text())["training"]
    for case, group in zip(content, (10, 10, 10, 7, 7, "b", "b", None)):
        case["group"] = group
    rewrite_json(folder, training=content)
    held_out = []
    for fold in range(7):
        train = names(load_datalist(folder, "training", fold=fold, num_folds=7))
        val = names(load_datalist(folder, "validation", fold=fold, num_folds=7))
        assert not set(train) & set(val) and len(train + val) == 11
        held_out.append(set(val))
    for together in ((0, 1, 2), (3, 4), (5, 6)):
        assert any({f"case{k}.nii.gz" for k in together} <= fold for fold in held_out)
    assert {"case9.nii.gz"} in held_out  # by itself, though its place in the list is 10
    for test_cases, tested in ((["b"], (5, 6)), ([7], (3, 4)), (["case0"], (0, 1, 2)), (["case8"], (8,))):
        assert names(load_datalist(folder, "test", test_cases=test_cases)) == [f"case{k}.nii.gz" for k in tested]
    assert len({frozenset(item) for item in load_datalist(folder, "all")}) == 1  # keys, which a batch has in common
    with pytest.raises(ValueError, match="lists 7 groups of labelled cases, too few for num_folds=8"):
        load_datalist(folder, num_folds=8)


def test_split_ignores_the_order_in_the_file_and_the_place_of_the_folder(tmp_path):
    one, two = write_dataset(tmp_path / "zz" / "set", 11), write_dataset(tmp_path / "a", 11)
    rewrite_json(two, training=json.loads((two / "dataset.json").read_text())["training"][::-1])
    assert names(load_datalist(one, "validation")) == names(load_datalist(two, "validation"))


def test_split_is_shuffled_by_the_seed(tmp_path):
    folder = write_dataset(tmp_path / "set", num_cases=11)
    splits = [names(load_datalist(folder, "validation", seed=seed)) for seed in (0, 0, 1, 2)]
    assert splits[0] == splits[1]
    assert len({tuple(s) for s in splits}) == 3
    assert names(load_datalist(folder, "all", seed=0)) == names(load_datalist(folder, "all", seed=1))


def test_paths_are_absolute_whatever_the_working_directory(dataset, monkeypatch):
    monkeypatch.chdir(dataset.parent)
    item = load_datalist("set", "all")[0]
    assert item == {
        "image": str(dataset / "imagesTr" / "case0.nii.gz"),
        "label": str(dataset / "labelsTr" / "case0.nii.gz"),
    }


@pytest.mark.parametrize("channels", [1, 3])
def test_test_cases_take_their_label_from_labels_ts_where_there_is_one(tmp_path, channels):
    folder = write_dataset(tmp_path / "set", num_cases=2, channels=channels, num_test=2)
    items = load_datalist(folder, "test")
    assert [item["label"] for item in items] == [str(folder / "labelsTs" / f"case{i}.nii.gz") for i in (2, 3)]
    (folder / "labelsTs" / "case2.nii.gz").unlink()
    assert ["label" in item for item in load_datalist(folder, "test")] == [False, True]


def test_channel_files_stay_in_order(tmp_path):
    folder = write_dataset(tmp_path / "set", num_cases=2, channels=3)
    item = load_datalist(folder, "all")[1]
    assert item["image"] == [str(folder / "imagesTr" / f"case1_{c:04d}.nii.gz") for c in range(3)]
    assert dataset_channels(folder) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"subset": "train"}, "subset must be one of training, validation, all, test"),
        ({"num_folds": 1}, "num_folds must be a whole number of at least 2"),
        ({"num_folds": 7}, "6 labelled cases, too few for num_folds=7"),
        ({"fold": 5}, "fold must be from 0 to 4"),
        ({"fold": -1}, "fold must be a whole number of at least 0"),
        ({"subset": "test"}, "lists no cases under 'test'"),
    ],
)
def test_bad_arguments_of_a_list_are_named(dataset, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_datalist(dataset, **arguments)


def test_absent_folders_are_named_with_the_layout(dataset):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; expected .* dataset.json, imagesTr"):
        load_datalist(dataset / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"labelsTr has no dataset.json; expected .* dataset.json, imagesTr"):
        load_datalist(dataset / "labelsTr")
    (dataset / "imagesTr").rename(dataset / "images")
    with pytest.raises(FileNotFoundError, match=r"imagesTr, which does not exist; expected .* dataset.json, imagesTr"):
        load_datalist(dataset)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "lists no cases under 'training'"),
        ('{"training": []}', "lists no cases under 'training'"),
        ('{"training": [{"image": "./imagesTr/lone.nii.gz"}]}', "must have an 'image' and a 'label', got .*lone"),
    ],
)
def test_malformed_dataset_json_is_named(tmp_path, text, message):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=f"dataset.json.*{message}"):
        load_datalist(tmp_path)


# ---- what dataset.json declares


def test_nnunet_form_of_channels_and_labels(dataset):
    rewrite_json(
        dataset, modality=None, channel_names={"0": "CT", "1": "PET"}, labels={"background": 0, "b": 2, "a": 1}
    )
    assert dataset_channels(dataset) == 2
    assert list(dataset_classes(dataset).items()) == [(0, "background"), (1, "a"), (2, "b")]


@pytest.mark.parametrize("channels", [1, 2])
def test_raw_folders_of_nnunet(tmp_path, channels):
    folder = write_dataset(tmp_path / "set", num_cases=2, channels=channels, num_test=1)
    listed = {subset: load_datalist(folder, subset) for subset in ("all", "test")}
    if channels == 1:  # there the channel is named, too
        for file in [*folder.glob("images*/*.nii.gz")]:
            file.rename(file.with_name(file.name.replace(".nii.gz", "_0000.nii.gz")))
    names_of_channels = {str(c): f"channel {c}" for c in range(channels)}
    changes = {"channel_names": names_of_channels, "file_ending": ".nii.gz", "numTraining": 2}
    rewrite_json(folder, modality=None, training=None, test=None, **changes)
    for subset, items in listed.items():
        for item in items:
            item["case"] = Path(item["label"]).name.removesuffix(".nii.gz")
            if channels == 1:
                item["image"] = item["image"].replace(".nii.gz", "_0000.nii.gz")
        assert load_datalist(folder, subset) == items
    assert [item["case"] for item in load_datalist(folder, "test", test_cases=["case1"])] == ["case1"]
    assert image_list(folder) == [{"image": item["image"]} for item in listed["test"]]
    (folder / "imagesTr" / "._case9_0000.nii.gz").write_bytes(b"")  # macOS adds such
    (folder / "imagesTr" / "case0_0000.nii.gz").unlink()
    if channels == 2:  # the other channel tells of the case
        assert load_datalist(folder, "all") == listed["all"]
        with pytest.raises(ValueError, match="case0_0000.nii.gz: the image file does not exist"):
            check_dataset(load_datalist(folder, "all"), 2, progress=False)
    rewrite_json(folder, file_ending=".nrrd")
    with pytest.raises(ValueError, match="imagesTr holds no image of nnU-Net's form, such as case_0000.nrrd"):
        load_datalist(folder)
    rewrite_json(folder, labels={"background": 0, "a": 1, "ignore": 2})
    with pytest.raises(ValueError, match="'ignore' is not supported"):
        dataset_classes(folder)


def test_a_folder_may_be_called_by_a_number(tmp_path, monkeypatch):
    write_dataset(tmp_path / "20230101")
    monkeypatch.chdir(tmp_path)
    assert len(load_datalist(20230101, "all")) == 6 and dataset_channels(20230101) == 1


@pytest.mark.parametrize("labels", [{"2": "b", "1": "a"}, {"b": 2, "a": 1}])
def test_background_is_added(dataset, labels):
    rewrite_json(dataset, labels=labels)
    assert dataset_classes(dataset) == {0: "background", 1: "a", 2: "b"}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"0": "background", "2": "b"}, "without a gap"),
        ({"background": 0, "whole": [1, 2]}, "one whole number"),
        ({"background": 0, "a": 1, "b": 1}, "same value"),
        (None, "declares no labels"),
        ({"0": "background", "1": "tumour", "2": "tumour"}, "a name of its own, other than 'mean', got 'tumour'"),
        ({"0": "background", "1": "a,b", "2": "a b"}, "a name of its own"),  # alike in tables
        ({"0": "background", "1": "mean"}, "a name of its own, other than 'mean'"),
        ({"0": "background", "1": ""}, "a name of its own"),
    ],
)
def test_bad_labels_are_named(dataset, labels, message):
    rewrite_json(dataset, labels=labels)
    with pytest.raises(ValueError, match=message):
        dataset_classes(dataset)


def test_the_digest_of_cases(tmp_path):
    """Goes by the names alone: not by the folder, nor by the order."""
    cases = [{"image": f"/a/{k}.nii.gz"} for k in range(3)]
    moved = [{"image": f"/b/{k}.nii.gz"} for k in (2, 0, 1)]
    assert cases_digest(cases) == cases_digest(moved) and cases_digest(cases).startswith("3 cases, ")
    assert len({cases_digest(cases), cases_digest(cases[:2]), cases_digest([*cases[:2], {"image": "/a/3.nii"}])}) == 3


def test_undeclared_channels_are_named(dataset):
    rewrite_json(dataset, modality=None)
    with pytest.raises(ValueError, match="declares no channels"):
        dataset_channels(dataset)


def test_a_case_listed_twice_is_refused(dataset):
    training = json.loads((dataset / "dataset.json").read_text())["training"]
    rewrite_json(dataset, training=[*training, training[2]])
    with pytest.raises(ValueError, match="case2.*more than once"):
        load_datalist(dataset, "training", num_folds=3)


def test_two_files_of_one_name_are_refused(dataset):
    """Results, label maps and pictures are named after the image."""
    training = json.loads((dataset / "dataset.json").read_text())["training"]
    for number in "ab":
        (dataset / number).mkdir()
        training.append({"image": f"./{number}/image.nii.gz", "label": training[0]["label"]})
    rewrite_json(dataset, training=training)
    with pytest.raises(ValueError, match="two files called image.nii.gz under 'training'"):
        load_datalist(dataset, "training", num_folds=3)
