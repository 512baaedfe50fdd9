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
"""Data sets as they are handed out: read as they are, and each task trained, evaluated and applied on a look-alike."""

from __future__ import annotations

import json
import pickle
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from scripts.datafolder import image_list
from scripts.datalist import load_datalist
from scripts.layouts import NoCasesError, layout_cases
from tests.conftest import BUNDLE_ROOT, TINY
from tests.lookalikes import TASK_TREES, make_tree


@pytest.fixture(scope="session")
def trees(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees")
    return {task: make_tree(task, folder / task) for task in TASK_TREES}


def test_every_task_has_a_look_alike():
    tasks = {file.stem for file in (BUNDLE_ROOT / "configs" / "tasks").iterdir()}
    assert tasks - {"phantom"} == set(TASK_TREES)


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_brats21(trees, tmp_path):
    cases = layout_cases(trees["brats21"], "brats21")
    assert [case["case"] for case in cases] == [f"BraTS2021_{k:05}" for k in range(5)]
    kinds = [file.split("_")[-1] for file in cases[0]["image"]]
    assert kinds == ["flair.nii.gz", "t1.nii.gz", "t1ce.nii.gz", "t2.nii.gz"]
    assert cases[0]["label"].endswith("BraTS2021_00000/BraTS2021_00000_seg.nii.gz")
    with pytest.raises(FileNotFoundError, match="no case to test on"):  # as BraTS 2021's training set is handed out
        load_datalist(trees["brats21"], "test", layout="brats21")
    assert len(image_list(trees["brats21"], "brats21")) == 5  # inference then takes them all
    shutil.copytree(trees["brats21"], tmp_path / "brats")
    (tmp_path / "brats" / "BraTS2021_00004" / "BraTS2021_00004_seg.nii.gz").unlink()
    (unlabelled,) = layout_cases(tmp_path / "brats", "brats21", labelled=False)
    assert unlabelled["case"] == "BraTS2021_00004" and "label" not in unlabelled
    assert len(image_list(tmp_path / "brats", "brats21")) == 1


def test_btcv(trees):
    cases = layout_cases(trees["btcv"], "btcv")
    assert len(cases) == 18
    for case in cases:
        assert case["label"].endswith(f"Training/label/{case['case'].replace('img', 'label')}.nii.gz")
    assert [case["case"] for case in layout_cases(trees["btcv"], "btcv", labelled=False)] == ["img0061"]
    assert layout_cases(trees["btcv"] / "RawData" / "Training", "btcv") == cases


def test_acdc_keeps_the_frames_of_a_patient_in_one_fold(trees):
    cases = layout_cases(trees["acdc"], "acdc")
    assert [case["case"] for case in cases[:2]] == ["patient001_frame01", "patient001_frame12"] and len(cases) == 6
    test = load_datalist(trees["acdc"], "test", layout="acdc")
    assert [case["case"] for case in test] == ["patient004_frame01", "patient004_frame12"] and "label" in test[0]
    for fold in range(3):
        train, val = (
            load_datalist(trees["acdc"], subset, fold, 3, layout="acdc") for subset in ("training", "validation")
        )
        assert len(train) == 4 and len(val) == 2 and len({case["group"] for case in val}) == 1
        assert {case["group"] for case in val}.isdisjoint(case["group"] for case in train)
    assert layout_cases(trees["acdc"] / "testing", "acdc", labelled=False) == test
    with pytest.raises(NoCasesError):  # they are not to be trained on
        layout_cases(trees["acdc"] / "testing", "acdc")


def test_test_cases_are_in_no_fold(trees):
    options = {"layout": "btcv", "test_cases": ["img0035", "img0040"]}
    test = load_datalist(trees["btcv"], "test", **options)
    assert [case["case"] for case in test] == ["img0035", "img0040"] and all("label" in case for case in test)
    rest = load_datalist(trees["btcv"], "all", **options)
    assert len(rest) == 16 and not {case["case"] for case in rest} & {"img0035", "img0040"}
    patients = load_datalist(trees["acdc"], "test", layout="acdc", test_cases=["patient002"])
    assert [case["case"] for case in patients] == ["patient002_frame01", "patient002_frame12"]
    decathlon = load_datalist(trees["spleen"], "test", test_cases=["case_002"])
    assert [case["image"][-15:] for case in decathlon] == ["case_002.nii.gz"]
    with pytest.raises(ValueError, match="has no case 'img0007', which test_cases names"):
        load_datalist(trees["btcv"], "training", layout="btcv", test_cases=["img0007"])


@pytest.mark.parametrize(
    ("layout", "text"),
    [("brats21", "BraTS2021_00000.*registration.*syn25829067"), ("btcv", "img0001.*syn3193805"), ("acdc", "creatis")],
)
def test_where_to_get_what_is_not_there(layout, text, tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match=text):
            layout_cases(folder, layout)


def test_incomplete_cases(trees, tmp_path):
    shutil.copytree(trees["brats21"], tmp_path / "brats")
    (tmp_path / "brats" / "BraTS2021_00001" / "BraTS2021_00001_t1ce.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="lacks BraTS2021_00001_t1ce"):
        layout_cases(tmp_path / "brats", "brats21")
    shutil.copytree(trees["btcv"], tmp_path / "btcv")
    (tmp_path / "btcv" / "RawData" / "Training" / "label" / "label0002.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="img0002.nii.gz has no label"):
        layout_cases(tmp_path / "btcv", "btcv")
    shutil.copytree(trees["btcv"], tmp_path / "twice" / "one")
    shutil.copytree(trees["btcv"], tmp_path / "twice" / "two")
    with pytest.raises(ValueError, match="img0001 more than once"):
        layout_cases(tmp_path / "twice", "btcv")
    with pytest.raises(ValueError, match="layout must be decathlon, brats21, btcv, acdc, got 'bids'"):
        layout_cases(tmp_path, "bids")


def test_files_that_macos_adds_are_no_cases_and_links_are_followed(trees, tmp_path):
    for case in sorted(trees["brats21"].iterdir())[:2]:
        (tmp_path / case.name).symlink_to(case, target_is_directory=True)
    shutil.copytree(trees["brats21"] / "BraTS2021_00003", tmp_path / "BraTS2021_00003")
    for file in sorted((tmp_path / "BraTS2021_00003").iterdir()):
        file.with_name(f"._{file.name}").write_bytes(b"")
    (tmp_path / "BraTS2021_00003" / "back").symlink_to(tmp_path, target_is_directory=True)
    assert len(layout_cases(tmp_path, "brats21")) == 3
    shutil.copytree(trees["acdc"], tmp_path / "acdc")
    (tmp_path / "acdc" / "all").symlink_to(tmp_path / "acdc" / "testing", target_is_directory=True)
    assert len(layout_cases(tmp_path / "acdc", "acdc", labelled=False)) == 2  # and none of them to train on
    assert len(layout_cases(tmp_path / "acdc", "acdc")) == 6


def test_images_to_segment(trees, tmp_path):
    assert [len(item["image"]) for item in image_list(trees["brats21"], "brats21")] == [4] * 5  # all have labels
    assert len(image_list(trees["acdc"], "acdc")) == 2  # testing
    shutil.copy(trees["btcv"] / "RawData" / "Testing" / "img" / "img0061.nii.gz", tmp_path / "scan.nii.gz")
    assert len(image_list(tmp_path, "btcv")) == 1  # a plain folder
    shutil.copytree(trees["btcv"] / "RawData" / "Training" / "img", tmp_path / "Training" / "img")
    assert len(image_list(tmp_path / "Training" / "img", "btcv")) == 18  # labels are not asked for
    shutil.copytree(trees["brats21"] / "BraTS2021_00001", tmp_path / "BraTS2021_00001")
    (tmp_path / "BraTS2021_00001" / "BraTS2021_00001_t1ce.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="lacks BraTS2021_00001_t1ce"):  # and no four volumes of one channel
        image_list(tmp_path / "BraTS2021_00001", "brats21")


# --- tasks ------------------------------------------------------------------------------------------------------------

REGIONS = ("brats21", "brain_tumour")


@pytest.mark.parametrize("task", sorted(TASK_TREES))
def test_every_task_trains_evaluates_and_segments(task, trees, tmp_path, workflow):
    settings = {key: TINY[key] for key in ("channels", "depths", "full_resolution_skip", "device", "sw_overlap")}
    settings |= {"patch_size": [16, 16, 16], "dataset_dir": str(trees[task]), "ckpt_dir": str(tmp_path / "models")}
    training = {**settings, "max_epochs": 1, "num_folds": 2, "batch_size": 1, "output_dir": str(tmp_path / "train")}
    flow = workflow(["train", f"tasks/{task}.yaml"], **training)
    pickle.dumps(flow.parser.get_parsed_content("train#preprocessing"))  # as processes that load data get it
    flow.run()
    assert np.isfinite(flow.trainer.state.metrics["train_mean_loss"])

    evaluation = {**training, "output_dir": str(tmp_path / "evaluate")}
    evaluation |= {"val_subset": "test"} if task in ("btcv", "synapse") else {}
    workflow(["train", "evaluate", f"tasks/{task}.yaml"], "evaluation", **evaluation).run()
    summary = json.loads((tmp_path / "evaluate" / "summary.json").read_text())
    assert summary["cases"] == {"btcv": 6, "synapse": 12, "acdc": 4, "brats21": 3}.get(task, 2)
    names = set(summary["val_mean_dice"]) - {"mean"}
    expected = {"brats21": 3, "brain_tumour": 3, "btcv": 13, "synapse": 8, "acdc": 3, "spleen": 1, "hippocampus": 2}
    assert len(names) == expected[task] and "background" not in names
    assert list((tmp_path / "evaluate" / "pictures").glob("*.png"))

    inference = {**settings, "output_dir": str(tmp_path / "inference")}
    workflow(["inference", f"tasks/{task}.yaml"], "inference", **inference).run()
    made = sorted((tmp_path / "inference").glob("*_seg.nii.gz"))
    images = image_list(
        trees[task], "decathlon" if task in ("hippocampus", "spleen", "brain_tumour") else flow.parser["layout"]
    )
    assert len(made) == len(images)
    given = images[0]["image"] if isinstance(images[0]["image"], str) else images[0]["image"][0]
    label = nib.load(made[0])
    assert label.shape == nib.load(given).shape[:3] and np.allclose(label.affine, nib.load(given).affine)
    allowed = {"brats21": {0, 1, 2, 4}, "brain_tumour": {0, 1, 2, 3}}.get(task, set(range(expected[task] + 1)))
    assert set(np.unique(label.dataobj)) <= allowed


@pytest.mark.parametrize("task", REGIONS)
def test_regions_become_the_labels_that_they_came_from(task, trees, workflow):
    """From the data set's label to regions and back."""
    flow = workflow(
        ["train", f"tasks/{task}.yaml"], dataset_dir=str(trees[task]), device="cpu", cache_rate=0.0, num_folds=2
    )
    regions = flow.parser.get_parsed_content("validate#preprocessing")
    case = load_datalist(trees[task], "all", layout=flow.parser["layout"])[0]
    label = regions(case)["label"]
    assert label.shape[0] == 3
    inference = workflow(["inference", f"tasks/{task}.yaml"], "inference", dataset_dir=str(trees[task]), device="cpu")
    (back,) = inference.parser.get_parsed_content("label_map")
    original = torch.as_tensor(np.asarray(nib.load(case["label"]).dataobj))
    assert set(original.unique().tolist()) == {0, 1, 2, 4 if task == "brats21" else 3}
    assert torch.equal(torch.as_tensor(back({"pred": label})["pred"])[0].long(), original.long())


def test_synapse_maps_the_organs(trees, workflow):
    flow = workflow(["train", "tasks/synapse.yaml"], dataset_dir=str(trees["synapse"]), device="cpu", cache_rate=0.0)
    btcv = {"spleen": 1, "right kidney": 2, "left kidney": 3, "gallbladder": 4, "liver": 6, "stomach": 7, "aorta": 8}
    btcv["pancreas"] = 11
    mapped = flow.parser.get_parsed_content("label_transform")({"label": torch.arange(14)[None, :, None, None]})[
        "label"
    ]
    names = flow.parser["class_names"]
    assert {names[int(mapped[0, value])]: value for value in btcv.values()} == btcv
    assert all(int(mapped[0, value]) == 0 for value in set(range(14)) - set(btcv.values()))


def test_the_papers_recipes(trees, workflow):
    """What the SegResMamba paper's appendix A says of its training."""
    for task, loss, patch in (("spleen", "softmax", 96), ("btcv", "softmax", 128), ("brats21", "sigmoid", 128)):
        flow = workflow(
            ["train", f"tasks/{task}.yaml"], dataset_dir=str(trees[task]), device="cpu", cache_rate=0.0, num_folds=2
        )
        parser = flow.parser
        optimizer = parser.get_parsed_content("optimizer")
        assert type(optimizer) is torch.optim.Adam
        assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (1e-4, 1e-5)
        assert type(parser.get_parsed_content("lr_scheduler")).__name__ == "CosineAnnealingLR"
        assert type(parser.get_parsed_content("loss")).__name__ == "DiceLoss"
        assert getattr(parser.get_parsed_content("loss"), loss) is True
        assert list(parser["patch_size"]) == [patch] * 3
        assert sum(p.numel() for p in parser.get_parsed_content("network_def").parameters()) > 80e6
        steps = parser.get_parsed_content("max_epochs") * len(parser.get_parsed_content("train#dataloader"))
        if task == "btcv":
            assert (
                steps / len(parser.get_parsed_content("train#dataloader")) / parser.get_parsed_content("val_interval")
                < 60
            )
            assert 25000 <= steps < 25000 + len(parser.get_parsed_content("train#dataloader"))


@pytest.mark.parametrize(
    ("task", "spacing", "crop", "batch"),
    [
        ("brain_tumour", [1, 1, 1], [128, 128, 128], 2),
        ("synapse", [3, 0.76, 0.76], [48, 192, 192], 2),
        ("acdc", [6.35, 1.52, 1.52], [14, 256, 224], 4),
    ],
)
def test_the_set_ups_of_taming_mambas(task, spacing, crop, batch, trees, workflow):
    """Table 1 and section 3.3. The axes are those of a NIfTI file from the last to the first: slice, row, column."""
    settings = {"dataset_dir": str(trees[task]), "device": "cpu", "cache_rate": 0.0, "num_folds": 2}
    parser = workflow(["train", f"tasks/{task}.yaml"], **settings).parser
    assert (parser["spacing"], parser["patch_size"], parser["batch_size"]) == (spacing, crop, batch)
    optimizer, scheduler = (parser.get_parsed_content(key) for key in ("optimizer", "lr_scheduler"))
    assert type(optimizer) is torch.optim.RAdam and optimizer.defaults["lr"] == 3e-4
    assert type(scheduler) is torch.optim.lr_scheduler.LinearLR and parser.get_parsed_content("max_epochs") == 300
    assert scheduler.total_iters == 300 * len(parser.get_parsed_content("train#dataloader"))
    if task != "brain_tumour":
        case = load_datalist(trees[task], "all", layout=parser["layout"])[0]
        image = parser.get_parsed_content("validate#preprocessing")(case)["image"]
        file = nib.load(case["image"])
        size = np.array(file.shape) * file.header.get_zooms()  # mm, of an image in RAS
        assert np.all(np.abs(np.array(image.shape[1:]) * spacing - size[::-1]) < np.array(spacing) * 2)
        assert [nib.aff2axcodes(image.affine.numpy())[axis] for axis in parser["mirror_axes"]] == ["R"]
