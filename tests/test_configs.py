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

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser, create_workflow, load_bundle_config
from monai.data import MetaTensor
from monai.inferers import SimpleInferer, SlidingWindowInferer
from packaging.specifiers import SpecifierSet

from scripts.autocast_inferer import AutocastInferer
from scripts.benchmark.networks import build_network
from scripts.clear_errors import ClearErrors
from scripts.datafolder import channel_count, class_names, image_list
from scripts.phantom_volume import PHANTOM_CLASSES, make_phantom
from tests.conftest import BUNDLE_ROOT, TINY
from tests.lookalikes import make_tree, write_series
from tests.test_datalist import save, write_dataset

CONFIGS = BUNDLE_ROOT / "configs"
NETWORKS = sorted(f"networks/{file.name}" for file in (CONFIGS / "networks").iterdir())
TASKS, OPTIONS = (sorted(f"{kind}/{file.name}" for file in (CONFIGS / kind).iterdir()) for kind in ("tasks", "options"))
OVERLAYS = [*TASKS, *NETWORKS, *OPTIONS]
INFERENCE = {
    key: TINY[key] for key in ("channels", "depths", "full_resolution_skip", "patch_size", "device", "spacing")
}
INFERENCE["pictures"] = False


def root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


# --- the main jobs, run as a user runs them ---------------------------------------------------------------------------


def test_train_evaluate_infer(trained):
    weights = torch.load(trained.models / "model.pt", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in weights.values())
    last = torch.load(trained.models / "last.pt", weights_only=True)
    assert {"model", "optimizer", "lr_scheduler", "trainer", "scaler"} <= set(last)
    assert not [file for file in trained.models.iterdir() if file.suffix != ".pt"]  # nothing half-written

    train = trained.folder / "train"
    assert list((train / "tensorboard").glob("events*"))
    rows = list(csv.DictReader(open(train / "training_curve.csv", encoding="utf-8")))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert (train / "training_curve.png").stat().st_size > 5000
    for name, bars in (
        ("train", ("Training", "Validation")),
        ("evaluate", ("Evaluation",)),
        ("inference", ("Inference",)),
    ):
        for bar in bars:
            assert bar in trained.runs[name].stderr
    looked_at = {name: run.stdout + run.stderr for name, run in trained.runs.items()}
    assert all("Preflight\n  versions  Python" in text for text in looked_at.values())
    assert " cases; 1 channel; " in looked_at["train"] and "label values 0, 1, 2, 3, 4 of 0 to 4" in looked_at["train"]
    assert re.search(r"weights +\S+/model.pt, \d+ tensors\n  data", looked_at["inference"])

    evaluated = trained.folder / "evaluate"
    summary = json.loads((evaluated / "summary.json").read_text())
    assert summary["cases"] == 2
    assert set(summary["val_mean_dice"]) == {*PHANTOM_CLASSES[1:5], "mean"} == set(summary["val_hd95"])
    rows = list(csv.DictReader(open(evaluated / "val_mean_dice_raw.csv", encoding="utf-8")))
    assert len(rows) == 2 and set(PHANTOM_CLASSES[1:5]) < set(rows[0])
    assert rows[0]["filename"].endswith(".nii.gz")
    dice = summary["val_mean_dice"]["mean"]
    assert dice["ci95_low"] <= dice["mean"] <= dice["ci95_high"]
    for name in ("val_mean_dice", "val_hd95", "val_surface_dice", "val_volume_error"):
        values = list(csv.reader(open(evaluated / f"{name}_raw.csv", encoding="utf-8")))
        assert all(np.isfinite([float(cell) for cell in row[1:]]).all() for row in values[1:]), name
    pictures = {file.name: file.read_bytes() for file in (evaluated / "pictures").iterdir()}
    assert len(pictures) == 5 and {"best.png", "median.png", "worst.png"} < set(pictures)
    means = {os.path.basename(row["filename"]): float(row["mean"]) for row in rows}
    for name, wanted in (("best.png", max(means.values())), ("worst.png", min(means.values()))):
        case = next(case for case in means if pictures[name] == pictures[case.replace(".nii.gz", "_overlay.png")])
        assert means[case] == wanted
    assert "spleen-like" in trained.runs["evaluate"].stdout  # the table

    inferred = trained.folder / "inference"
    for image in sorted((trained.data / "imagesTs").iterdir()):
        given, made = nib.load(image), nib.load(inferred / image.name.replace(".nii.gz", "_seg.nii.gz"))
        assert made.shape == given.shape and made.get_data_dtype() == np.uint8
        assert np.array_equal(made.affine, given.affine)
        assert np.unique(made.dataobj).max() < 5
    assert len(list((inferred / "pictures").glob("*_overlay.png"))) == 2
    cases = json.loads((inferred / "cases.json").read_text())
    assert set(cases) == {image.name for image in (trained.data / "imagesTs").iterdir()}
    for name, case in cases.items():
        made = nib.load(inferred / name.replace(".nii.gz", "_seg.nii.gz"))
        voxels = np.bincount(np.asarray(made.dataobj).ravel(), minlength=5)[1:]
        expected = voxels * np.abs(np.linalg.det(made.affine[:3, :3])) / 1000
        assert list(case["volumes_ml"]) == list(PHANTOM_CLASSES[1:5]) and case["seconds"] > 0
        np.testing.assert_allclose(list(case["volumes_ml"].values()), expected, atol=1e-3)


def test_probabilities(tmp_path, trained, workflow):
    image = sorted((trained.data / "imagesTs").iterdir())[0]
    overrides = {**INFERENCE, "input": str(image), "dataset_dir": str(trained.data), "ckpt_dir": str(trained.models)}
    zooms = nib.as_closest_canonical(nib.load(image)).header.get_zooms()
    overrides["spacing"] = [float(step) for step in zooms]  # so that nothing is resampled
    configs = ["inference", "tasks/phantom.yaml", "options/probabilities.yaml"]
    workflow(configs, "inference", **overrides, output_dir=str(tmp_path)).run()
    given = nib.load(image)
    label, probability = (
        nib.load(tmp_path / image.name.replace(".nii.gz", f"_{name}.nii.gz")) for name in ("seg", "prob")
    )
    values = np.asarray(probability.dataobj)
    assert values.dtype == np.float32 and values.shape == (*given.shape, 5)
    np.testing.assert_allclose(probability.affine, given.affine)
    np.testing.assert_allclose(values.sum(-1), 1, atol=1e-4)
    assert np.mean(values.argmax(-1) == np.asarray(label.dataobj)) > 0.9999


def test_files_and_dicom_series_as_input(tmp_path, trained, workflow):
    """A NIfTI file and the same volume as a DICOM series, in one call, get the same label map."""
    pydicom, highdicom = (pytest.importorskip(name) for name in ("pydicom", "highdicom"))
    source = sorted((trained.data / "imagesTs").iterdir())[0]
    image = nib.as_closest_canonical(nib.load(source))
    values = np.rint(image.get_fdata()).astype(np.int16)
    nib.save(nib.Nifti1Image(values, image.affine), tmp_path / "volume.nii.gz")
    to_dicom = np.array([[-1, 0, 0, values.shape[0] - 1], [0, -1, 0, values.shape[1] - 1], [0, 0, 1, 0], [0, 0, 0, 1]])
    write_series(tmp_path / "1.2.840.1", values[::-1, ::-1], image.affine @ to_dicom)
    shutil.copy(trained.data / "dataset.json", tmp_path)  # names of the classes, beside what is given
    overrides = {key: value for key, value in INFERENCE.items() if key != "dataset_dir"}
    overrides |= {"input": [str(tmp_path / "volume.nii.gz"), str(tmp_path / "1.2.840.1")]}
    overrides |= {"ckpt_dir": str(trained.models), "output_dir": str(tmp_path / "out")}
    workflow(["inference", "tasks/phantom.yaml"], "inference", **overrides).run()
    one, other = (
        nib.as_closest_canonical(nib.load(tmp_path / "out" / f"{name}_seg.nii.gz")) for name in ("volume", "1.2.840.1")
    )
    np.testing.assert_allclose(one.affine, other.affine, atol=1e-3)
    assert one.get_data_dtype() == other.get_data_dtype() == np.uint8
    assert np.mean(np.asarray(one.dataobj) == np.asarray(other.dataobj)) > 0.999
    cases = json.loads((tmp_path / "out" / "cases.json").read_text())
    assert set(cases) == {"volume.nii.gz", "1.2.840.1"}
    segmentation = highdicom.seg.segread(tmp_path / "out" / "1.2.840.1_seg.dcm")
    assert [segment.SegmentLabel for segment in segmentation.SegmentSequence] == list(PHANTOM_CLASSES[1:5])
    labels = np.asarray(nib.load(tmp_path / "out" / "1.2.840.1_seg.nii.gz").dataobj)
    assert labels.any()
    for file in (tmp_path / "1.2.840.1").iterdir():
        header = pydicom.dcmread(file, stop_before_pixels=True)
        (plane,) = segmentation.get_pixels_by_source_instance(
            [header.SOPInstanceUID],
            combine_segments=True,
            ignore_spatial_locations=True,
            assert_missing_frames_are_empty=True,
        )
        np.testing.assert_array_equal(plane.T, labels[:, :, header.InstanceNumber - 1])


def test_labels_are_brought_to_the_grid_of_their_images(tmp_path, workflow):
    """Spacings that differ a little, by which the two would have 96 and 97 voxels."""
    folder, rng = write_dataset(tmp_path / "set", num_cases=2), np.random.RandomState(0)
    for file in (folder / "imagesTr").iterdir():
        save(rng.normal(size=(100, 12, 12)).astype(np.float32), file, np.diag([0.961, 1, 1, 1]))
        save(np.ones((100, 12, 12), np.uint8), folder / "labelsTr" / file.name, np.diag([0.965, 1, 1, 1]))
    settings = {"patch_size": [8, 8, 8], "num_folds": 2, "device": "cpu", "cache_rate": 0.0}
    flow = workflow(["train"], dataset_dir=str(folder), **settings)
    case = flow.parser.get_parsed_content("train#dataset").data[0]
    for transform in flow.parser.get_parsed_content("train#deterministic_transforms"):
        case = transform(case)
    assert case["image"].shape == case["label"].shape == (1, 96, 12, 12)


def test_no_case_is_checked_twice(phantom_dir, workflow):
    """Where a training takes all cases, those validated are among them."""
    settings = {"dataset_dir": str(phantom_dir), "train_subset": "all", "device": "cpu", "cache_rate": 0.0}
    flow = workflow(["train", "tasks/phantom.yaml"], **settings)
    assert len(flow.parser.get_parsed_content("data_check#datalist")) == 6


def test_evaluation_is_on_the_original_grid(trained):
    """The Dice that evaluation wrote is that of label maps which inference writes for the same cases."""
    rows = list(csv.DictReader(open(trained.folder / "evaluate" / "val_mean_dice_raw.csv", encoding="utf-8")))
    images = trained.folder / "again" / "imagesTs"
    images.mkdir(parents=True)
    for row in rows:
        shutil.copy(row["filename"], images)
    output = trained.folder / "again" / "out"
    flow = create_workflow(
        config_file=[str(CONFIGS / "inference.json"), str(CONFIGS / "tasks" / "phantom.yaml")],
        workflow_type="inference",
        logging_file=False,
        bundle_root=str(BUNDLE_ROOT),
        dataset_dir=str(images),
        ckpt_dir=str(trained.models),
        output_dir=str(output),
        sw_overlap=TINY["sw_overlap"],
        **INFERENCE,
    )
    flow.run()
    seen = []
    for row in rows:
        name = os.path.basename(row["filename"])
        made = np.asarray(nib.load(output / name.replace(".nii.gz", "_seg.nii.gz")).dataobj)
        label = np.asarray(nib.load(trained.data / "labelsTr" / name).dataobj)
        for value, organ in enumerate(PHANTOM_CLASSES[1:5], start=1):
            both = (made == value).sum() + (label == value).sum()
            dice = 2 * ((made == value) & (label == value)).sum() / both
            assert float(row[organ]) == pytest.approx(dice, abs=1e-4)
            seen.append(dice)
    assert max(seen) > 0


@pytest.mark.parametrize("folds", [2, 6])
def test_two_processes_train_alike(folds, tmp_path, phantom_dir, run_bundle):
    """Also with fewer cases to validate on than processes: each takes all then."""
    settings = {**TINY, "max_epochs": 1, "num_folds": folds, "dataset_dir": phantom_dir}
    result = run_bundle(
        ["train", "multi_gpu_train", "tasks/phantom.yaml"],
        launcher=("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"),
        **{**settings, "ckpt_dir": tmp_path, "output_dir": tmp_path},
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert not any(key.startswith("module.") for key in torch.load(tmp_path / "model.pt", weights_only=True))
    assert (tmp_path / "last.pt").is_file()
    assert result.stdout.count("Key metric: val_mean_dice") == 1  # one process reports


# Padded to 64 voxels an axis, so not at their real width.
NARROW = {
    "swin_unetr": {"network_def#network#feature_size": 12},
    "dynunet": {"network_def#network#filters": [8, 16, 32, 32, 32, 32]},
}


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_trains_and_segments(network, tmp_path, phantom_dir, workflow):
    """On a few voxels."""
    own = ("channels", "depths", "full_resolution_skip")
    settings = {key: value for key, value in TINY.items() if key not in own}
    settings |= NARROW.get(Path(network).stem, {})
    settings |= {"patch_size": [16] * 3, "spacing": [12.0, 12.0, 12.0], "max_epochs": 1, "batch_size": 4}
    settings |= {"dataset_dir": str(phantom_dir), "ckpt_dir": str(tmp_path / "models"), "output_dir": str(tmp_path)}
    workflow(["train", "tasks/phantom.yaml", network], **settings).run()
    for key in ("num_folds", "batch_size", "max_epochs", "val_interval", "check_data"):
        settings.pop(key)
    workflow(["inference", "tasks/phantom.yaml", network], "inference", **settings).run()
    assert len(list(tmp_path.glob("*_seg.nii.gz"))) == 2


def test_deep_supervision(tmp_path, phantom_dir, workflow):
    """The loss is that of several levels in training, while validation, evaluation and inference see one output."""
    settings = {
        "patch_size": [16, 16, 16],
        "spacing": [12.0, 12.0, 12.0],
        "network_def#channels": [8, 8, 16, 16, 16, 16],
    }
    settings |= {key: TINY[key] for key in ("device", "sw_overlap", "pictures")}
    settings |= {"dataset_dir": str(phantom_dir), "ckpt_dir": str(tmp_path / "models"), "output_dir": str(tmp_path)}
    training = {**settings, "max_epochs": 1, "batch_size": 4, "num_folds": 3, "check_data": False}
    overlays = ["tasks/phantom.yaml", "networks/umamba_bot.yaml", "options/deep_supervision.yaml"]
    flow = workflow(["train", *overlays], **training)
    flow.run()
    assert np.isfinite(flow.trainer.state.metrics["train_mean_loss"])
    assert len(flow.network_def.heads) == 5
    assert all(head.weight.grad.abs().sum() > 0 for head in flow.network_def.heads)
    workflow(["train", "evaluate", *overlays], "evaluation", **training).run()
    assert json.loads((tmp_path / "summary.json").read_text())["cases"] == 2
    workflow(["inference", *overlays], "inference", **settings).run()
    assert len(list(tmp_path.glob("*_seg.nii.gz"))) == 2


def test_options_together(tmp_path, phantom_dir, workflow):
    """The mean of the weights is what is validated and kept, and an interrupted training goes on with it."""
    settings = {**TINY, "dataset_dir": str(phantom_dir), "max_epochs": 3, "val_interval": 3, "max_gradient_norm": 1e-3}
    options = ["ema", "gradient_clipping", "warm_up", "augmentation", "test_time_flipping"]
    overlays = ["tasks/phantom.yaml", *(f"options/{name}.yaml" for name in options)]

    def make(folder, **own):
        places = {"ckpt_dir": str(tmp_path / folder), "output_dir": str(tmp_path / folder)}
        return workflow(["train", *overlays], **{**settings, **places, **own})

    whole = make("whole")
    rates, norms = [], []

    def watch(engine):
        rates.append(engine.optimizer.param_groups[0]["lr"])
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in engine.network.parameters()]).item())

    whole.trainer.add_event_handler(Events.ITERATION_COMPLETED, watch)
    whole.run()
    assert max(norms) <= 1e-3 * 1.001
    assert np.all(np.diff(rates) > 0)  # warms up over five epochs, of which three are run
    last = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)
    assert any(not torch.equal(value, last["ema_model"][key]) for key, value in last["model"].items())
    kept = torch.load(tmp_path / "whole" / "model.pt", weights_only=True)
    assert all(torch.equal(value, kept[key]) for key, value in last["ema_model"].items())

    parts = make("parts")
    parts.trainer.add_event_handler(Events.EPOCH_STARTED(once=2), lambda engine: engine.terminate(skip_completed=True))
    parts.run()
    make("parts", resume=True).run()
    again = torch.load(tmp_path / "parts" / "last.pt", weights_only=True)
    assert all(torch.allclose(value, again["ema_model"][key], atol=1e-6) for key, value in last["ema_model"].items())

    places = {"ckpt_dir": str(tmp_path / "whole"), "output_dir": str(tmp_path / "evaluation")}
    evaluation = workflow(["train", "evaluate", *overlays], "evaluation", **settings, **places)
    evaluation.run()
    assert all(torch.equal(value, kept[key]) for key, value in evaluation.evaluator.network.state_dict().items())
    found = json.loads((tmp_path / "evaluation" / "summary.json").read_text())
    plain = ["tasks/phantom.yaml", "options/test_time_flipping.yaml"]
    workflow(["train", "evaluate", *plain], "evaluation", **settings, **places).run()
    assert json.loads((tmp_path / "evaluation" / "summary.json").read_text()) == found
    settings = {**INFERENCE, "dataset_dir": str(phantom_dir), **places}
    workflow(["inference", "tasks/phantom.yaml", "options/test_time_flipping.yaml"], "inference", **settings).run()
    assert len(list((tmp_path / "evaluation").glob("*_seg.nii.gz"))) == 2


def test_fine_tuning_with_other_classes_and_channels(tmp_path, trained, workflow, caplog):
    places = {"ckpt_dir": str(tmp_path), "output_dir": str(tmp_path), "pretrained": str(trained.models / "model.pt")}
    settings = {**TINY, "dataset_dir": str(trained.data), **places, "max_epochs": 1}
    given = torch.load(trained.models / "model.pt", weights_only=True)

    same = workflow(["train", "tasks/phantom.yaml"], **settings)
    assert all(torch.equal(value, given[key]) for key, value in same.network_def.state_dict().items())

    with caplog.at_level("INFO", logger="scripts.weights"):
        other = workflow(["train", "tasks/phantom.yaml"], **settings, out_channels=7, in_channels=2)
    now = other.network_def.state_dict()
    left = {key for key in given if now[key].shape != given[key].shape}
    assert left == {"stem.weight", "full_resolution.0.weight", "head.weight", "head.bias"}
    assert all(torch.equal(value, given[key]) for key, value in now.items() if key not in left)
    told = caplog.text.rpartition("not in the file with this shape: ")[2]
    assert all(name in told for name in left) and "skips" not in told


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no weights at"), ({"other": torch.ones(2)}, "no weights that fit"), (b"no", "can be read")],
)
def test_fine_tuning_refuses_other_files(content, message, tmp_path, phantom_dir, workflow):
    file = tmp_path / "given.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    places = {"ckpt_dir": str(tmp_path), "output_dir": str(tmp_path), "pretrained": str(file)}
    with pytest.raises(RuntimeError) as error:
        workflow(["train", "tasks/phantom.yaml"], **{**TINY, "dataset_dir": str(phantom_dir), **places})
    assert message in str(error.value.__cause__)


@pytest.mark.parametrize("task", ["hippocampus", "brain_tumour"])
def test_deep_supervision_of_segresmamba(task, tmp_path, workflow):
    """With classes and with regions; the logits of a level are as large as its own grid."""
    settings = {**TINY, "channels": [8, 8, 16], "depths": [0, 0, 0], "patch_size": [16, 16, 16], "max_epochs": 1}
    places = {"ckpt_dir": str(tmp_path / "models"), "output_dir": str(tmp_path / "out")}
    settings |= {**places, "dataset_dir": str(make_tree(task, tmp_path / "data")), "num_folds": 2}
    overlays = [f"tasks/{task}.yaml", "options/deep_supervision.yaml"]
    flow = workflow(["train", *overlays], **settings)
    flow.run()
    network = flow.network_def
    outputs = network.train()(torch.rand(1, network.in_channels, 16, 16, 16))
    assert [output.shape[2] for output in outputs] == [16, 8, 4]
    assert all(head.weight.grad.abs().sum() > 0 for head in network.level_heads)
    workflow(["train", "evaluate", *overlays], "evaluation", **settings).run()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["cases"] == 2


def test_the_background_can_be_measured(tmp_path, trained, workflow):
    """And class names with a comma do not shift the columns of the CSV files."""
    names = ["background", *(f"{name}, left" for name in PHANTOM_CLASSES[1:5])]
    settings = {**TINY, "dataset_dir": str(trained.data), "ckpt_dir": str(trained.models), "output_dir": str(tmp_path)}
    settings |= {"include_background": True, "class_names": names}
    workflow(["train", "evaluate", "tasks/phantom.yaml"], "evaluation", **settings).run()
    first, *_ = csv.DictReader(open(tmp_path / "val_mean_dice_raw.csv", encoding="utf-8"))
    values = [float(first[name]) for name in ["background", *(f"{name}  left" for name in PHANTOM_CLASSES[1:5])]]
    assert values[0] > max(values[1:]) and float(first["mean"]) == pytest.approx(np.mean(values), abs=1e-3)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_page_on_networks_has_their_parameters(network):
    page = (BUNDLE_ROOT / "docs" / "networks.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith(f"| `{Path(network).name}` |"))
    made = build_network(Path(network).stem, 1, 9, (96, 96, 96), "meta")
    assert f"{sum(p.numel() for p in made.parameters()) / 1e6:.2f} M" in row


# --- geometry of the label maps ---------------------------------------------------------------------------------------


def test_label_maps_keep_the_geometry(tmp_path, workflow):
    """Same grid as the input whatever its orientation, and the same labels when only the axes' order differs."""
    images = tmp_path / "imagesTs"
    images.mkdir()
    image, _, affine = make_phantom(5, orientation="RAS", oblique=True, spatial_size=(40, 36, 44), spacing=(3, 3.5, 4))
    original = nib.Nifti1Image(image, affine)
    nib.save(original, images / "ras.nii.gz")
    for codes in ("LPS", "PIR", "SAL"):
        turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(tuple(codes)))
        nib.save(original.as_reoriented(turn), images / f"{codes.lower()}.nii.gz")
    oblique_lps = make_phantom(6, orientation="LPS", oblique=True, spatial_size=(37, 41, 33), spacing=(3.7, 3.1, 4.4))
    nib.save(nib.Nifti1Image(oblique_lps[0], oblique_lps[2]), images / "oblique_lps.nii.gz")

    settings = {**INFERENCE, "num_classes": 5, "dataset_dir": str(tmp_path), "ckpt_dir": str(tmp_path)}
    settings["output_dir"] = str(tmp_path / "out")
    flow = workflow(["inference", "tasks/phantom.yaml"], "inference", **settings)
    torch.manual_seed(1)
    for parameter in flow.network_def.parameters():  # random, so that there are labels of every kind
        torch.nn.init.normal_(parameter, std=0.3)
    torch.save(flow.network_def.state_dict(), tmp_path / "model.pt")
    flow.run()

    made = {}
    for file in sorted(images.iterdir()):
        given, label = nib.load(file), nib.load(tmp_path / "out" / file.name.replace(".nii.gz", "_seg.nii.gz"))
        assert label.shape == given.shape
        assert np.array_equal(label.affine, given.affine), file.name
        assert nib.aff2axcodes(label.affine) == nib.aff2axcodes(given.affine)
        assert label.get_data_dtype() == np.uint8
        assert len(np.unique(label.dataobj)) > 1
        made[file.name] = nib.as_closest_canonical(label).get_fdata()
    for codes in ("lps", "pir", "sal"):
        assert (made[f"{codes}.nii.gz"] == made["ras.nii.gz"]).mean() > 0.999, codes


@pytest.mark.parametrize("form", ["4D", "files"])
def test_label_maps_of_several_channels_keep_the_geometry(form, tmp_path, workflow):
    """Wherever the slices lie: MONAI's writer fails by itself where their axis is not the last."""
    (tmp_path / "imagesTs").mkdir()
    entries, given = [], {}
    channels = np.random.default_rng(0).normal(size=(24, 18, 9, 2)).astype(np.float32)
    for codes in ("RAS", "RSA", "SAR", "LPI"):
        image = nib.Nifti1Image(channels, np.diag([3, 3.5, 5, 1]))
        turn = nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(codes))
        )
        image = image.as_reoriented(turn)
        if form == "files":
            paths = [f"imagesTs/{codes}_{k}.nii.gz" for k in range(2)]
            for k, path in enumerate(paths):
                nib.save(nib.Nifti1Image(image.get_fdata()[..., k], image.affine), tmp_path / path)
        else:
            paths = [f"imagesTs/{codes}.nii.gz"]
            nib.save(image, tmp_path / paths[0])
        entries.append(paths if form == "files" else paths[0])
        given[Path(paths[0]).name] = image.shape[:3], image.affine
    content = {"labels": {str(k): name for k, name in enumerate(["background", *"abcd"])}, "test": entries}
    content["modality"] = {"0": "T1", "1": "T2"}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    settings = {**INFERENCE, "num_classes": 5, "in_channels": 2, "ckpt_dir": str(tmp_path)}
    places = {"dataset_dir": str(tmp_path), "output_dir": str(tmp_path / "out")}
    flow = workflow(["inference", "tasks/phantom.yaml"], "inference", **settings, **places)
    torch.save(flow.network_def.state_dict(), tmp_path / "model.pt")
    flow.run()
    for name, (shape, affine) in given.items():
        label = nib.load(tmp_path / "out" / name.replace(".nii.gz", "_seg.nii.gz"))
        assert label.shape == shape and np.allclose(label.affine, affine, atol=1e-4)


def test_image_path_of_other_applications_passes(tmp_path, phantom_dir, workflow):
    """MONAI Label puts the string ``image_path`` beside the image; Spacingd would choke on it."""
    flow = workflow(["inference"], "inference", dataset_dir=str(phantom_dir), ckpt_dir=str(tmp_path), **INFERENCE)
    image = image_list(phantom_dir)[0]["image"]
    data = flow.preprocessing({"image": image, "image_path": image})
    assert data["image_path"] == image and "source_path" not in data
    assert data["image"].shape[0] == 1


# --- the configs as MONAI's tools see them ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("configs", "workflow_type"),
    [
        (["train"], "train"),
        (["train", "tasks/hippocampus.yaml"], "train"),
        (["train", "tasks/phantom.yaml"], "train"),
        (["train", "evaluate"], "train"),
        (["train", "evaluate"], "evaluation"),
        (["inference"], "inference"),
        (["inference", "tasks/hippocampus.yaml"], "inference"),
    ],
)
def test_check_properties(configs, workflow_type, workflow, phantom_dir, tmp_path):
    flow = workflow(
        configs,
        workflow_type,
        dataset_dir=str(phantom_dir),
        output_dir=str(tmp_path),
        ckpt_dir=str(tmp_path),
        cache_rate=0.0,
        device="cpu",
    )
    assert flow.check_properties() == []


def test_workflow_from_another_directory(tmp_path, phantom_dir):
    code = (
        "import sys; from monai.bundle import create_workflow\n"
        "root, data = sys.argv[1:]\n"
        "flow = create_workflow(config_file=root + '/configs/inference.json', workflow_type='inference',"
        " bundle_root=root, dataset_dir=data, device='cpu')\n"
        "print('network:', type(flow.network_def).__name__, flow.check_properties())\n"
        "print('compiler:', 'torch._dynamo' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(BUNDLE_ROOT), str(phantom_dir)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "network: SegResMamba []" in result.stdout, result.stderr[-2000:]
    assert "compiler: False" in result.stdout  # whose import would take a second or more of every start


def test_metadata():
    meta = json.loads((CONFIGS / "metadata.json").read_text())
    assert meta["version"] in meta["changelog"]
    assert "optional_packages_version" not in meta
    assert "CC-BY-SA 4.0" in meta["data_license"] and "Limits: " in meta["intended_use"]
    requirements = (CONFIGS.parent / "requirements.txt").read_text()
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", requirements, flags=re.MULTILINE))
    assert (meta["monai_version"], meta["pytorch_version"]) == (pins["monai"], pins["torch"])
    for package, versions in meta["required_packages_version"].items():
        assert pins[package] in SpecifierSet(versions), package
    parser = ConfigParser(ConfigParser.load_config_file(CONFIGS / "inference.json"))
    channel_def = meta["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert [channel_def[str(k)] for k in range(len(channel_def))] == parser["class_names#default"]


@pytest.mark.parametrize("overlay", ["evaluate.json", "multi_gpu_train.json", *OVERLAYS])
def test_overlays_change_what_is_there(overlay):
    """An overlay's keys are those of train.json, save for the few that it adds, so that none is a slip of the pen."""
    added = {
        "checkpoint",
        "weights_check",
        "dataset",
        "evaluator",
        "inferer",
        "handlers",
        "first_rank_handlers",
        "finalize",
    }
    added |= {f"{part}#{key}" for part in ("train", "validate") for key in ("sampler", "dataloader#sampler")}
    added |= {"train#trainer#train_handlers", "validate#evaluator#val_handlers"}
    added |= {"network_def#block", "network_def#downsample_conv"}  # the paper's ablations
    added |= {"network_def#deep_supervision", "label_map", "label_names"}
    added |= {"probability", "save_probability", "postprocessing#transforms"}
    added |= {
        "ema",
        "ema_momentum",
        "max_gradient_norm",
        "warm_up_epochs",
        "ensemble",
        "num_networks",
        "country",
        "noise_std",
    }
    added |= {"_meta_"}  # for a release
    added |= {"label_maps", "validate#dataset#data#label_maps"}
    added |= {"validate#handlers#0#_disabled_", "validate#handlers#2#batch_transform"}  # of evaluate.json's
    base = ConfigParser(ConfigParser.load_config_file(CONFIGS / "train.json"))
    keys = [key.removeprefix("+") for key in ConfigParser.load_config_file(CONFIGS / overlay)]  # "+" adds to a list
    unknown = [key for key in keys if key not in base and key not in added]
    assert unknown == []


def test_shared_keys_agree():
    """What train.json and inference.json both say is the same, where it belongs to network and preprocessing."""
    train = ConfigParser.load_config_file(CONFIGS / "train.json")
    inference = ConfigParser.load_config_file(CONFIGS / "inference.json")
    own = {"imports", "data_check", "preflight", "num_workers", "precision", "sw_overlap", "sw_batch_size", "flip_axes"}
    own |= {"initialize", "run", "class_names", "in_channels"}  # those two go by inference's input first
    for key in set(train) & set(inference) - own:
        assert train[key] == inference[key], key


def test_every_file_is_in_form():
    for file in CONFIGS.glob("*.json"):
        text = file.read_text()
        assert text == json.dumps(json.loads(text), indent=4) + "\n", file.name
    for file in [*CONFIGS.rglob("*.json"), *CONFIGS.rglob("*.yaml"), CONFIGS / "logging.conf"]:
        assert not re.search(r"(?<![\w@'/.])/(work|home|workspace|mnt|tmp|root|data)\b", file.read_text()), file.name
    assert all(isinstance(h, dict) for h in load_bundle_config(str(BUNDLE_ROOT), "train.json")["train#handlers"])
    targets = {h["_target_"] for h in load_bundle_config(str(BUNDLE_ROOT), "train.json")["train#handlers"]}
    assert "CheckpointLoader" not in targets  # MONAI Label would not load its weights then


# --- bad input --------------------------------------------------------------------------------------------------------


def broken_copy(phantom_dir: Path, target: Path, kind: str) -> Path:
    shutil.copytree(phantom_dir, target)
    label = target / "labelsTr" / "phantom_001.nii.gz"
    image = target / "imagesTr" / "phantom_001.nii.gz"
    if kind == "no label":
        label.unlink()
    elif kind == "label value":
        found = nib.load(label)
        nib.save(nib.Nifti1Image(np.full(found.shape, 9, np.uint8), found.affine), label)
    elif kind == "no image":
        image.write_text("this is no image")
    elif kind == "empty":
        shutil.rmtree(target)
        target.mkdir()
    return target


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no label", "phantom_001"),
        ("label value", "found 9"),
        ("no image", "imagesTr/phantom_001.nii.gz: cannot be read"),
        ("empty", "no dataset.json"),
    ],
)
def test_bad_data_stops_before_training(kind, message, tmp_path, phantom_dir, workflow):
    data = broken_copy(phantom_dir, tmp_path / "data", kind)
    overrides = {**TINY, "check_data": True, "dataset_dir": str(data), "output_dir": str(tmp_path / "out")}
    with pytest.raises(RuntimeError) as error:
        workflow(["train", "tasks/phantom.yaml"], **overrides, ckpt_dir=str(tmp_path / "models")).run()
    assert message in root_cause(error.value)
    assert not (tmp_path / "out").exists()


def test_missing_folder_is_one_clear_error(tmp_path, run_bundle):
    result = run_bundle(["train"], dataset_dir=tmp_path / "nowhere")
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ") and str(tmp_path / "nowhere") in last and "does not exist" in last


@pytest.fixture
def hook(capfd):
    """What the hook, which runs from the command line have in place, prints of an error of this process."""

    def printed(caught: pytest.ExceptionInfo) -> str:
        capfd.readouterr()
        ClearErrors(lambda *_: pytest.fail("no clear error"))(caught.type, caught.value, caught.tb)
        return capfd.readouterr().err

    return printed


def test_malformed_dataset_json_is_one_clear_error(tmp_path, phantom_dir, workflow, hook):
    data = broken_copy(phantom_dir, tmp_path / "data", "none")
    (data / "dataset.json").write_text("{oops")
    with pytest.raises(RuntimeError) as caught:
        workflow(["train"], dataset_dir=str(data))
    error = hook(caught)
    assert str(data / "dataset.json") in error and "not valid JSON" in error


@pytest.mark.parametrize(
    ("configs", "kind", "more"),
    [(["inference"], "inference", {}), (["train", "evaluate"], "evaluation", {"num_folds": 3})],
)
def test_missing_weights_are_one_clear_error(configs, kind, more, tmp_path, trained, workflow, hook):
    with pytest.raises(RuntimeError) as caught:
        workflow(configs, kind, dataset_dir=str(trained.data), ckpt_dir=str(tmp_path), **more).run()
    error = hook(caught)
    assert f"no weights at {tmp_path}/model.pt" in error and "--checkpoint" in error


def test_weights_of_another_network_are_one_clear_error(tmp_path, trained, workflow, hook):
    overrides = {**INFERENCE, "channels": [8, 24], "dataset_dir": str(trained.data), "ckpt_dir": str(trained.models)}
    with pytest.raises(RuntimeError) as caught:
        workflow(["inference", "tasks/phantom.yaml"], "inference", **overrides, output_dir=str(tmp_path)).run()
    error = hook(caught)
    assert "model.pt holds the weights of another network" in error and "24" in error


def test_damaged_image_stops_inference_before_it_starts(tmp_path, trained, workflow, hook):
    images = tmp_path / "images"
    shutil.copytree(trained.data / "imagesTs", images)
    (images / "zzz.nii.gz").write_text("this is no image")
    overrides = {**INFERENCE, "dataset_dir": str(images), "ckpt_dir": str(trained.models), "num_classes": 5}
    with pytest.raises(RuntimeError) as caught:
        workflow(["inference", "tasks/phantom.yaml"], "inference", **overrides, output_dir=str(tmp_path / "out")).run()
    error = hook(caught)
    assert "zzz.nii.gz" in error and "cannot be read" in error
    assert not list(tmp_path.glob("out/*.nii.gz"))


@pytest.mark.parametrize("key", ["max_epochs", "train#trainer#max_epochs"])  # the second is what MONAI Label sets
def test_a_short_training_leaves_weights_too(key, tmp_path, phantom_dir, workflow):
    overrides = {**TINY, "max_epochs": 8, key: 1, "val_interval": 5, "dataset_dir": str(phantom_dir)}
    workflow(["train", "tasks/phantom.yaml"], **overrides, output_dir=str(tmp_path), ckpt_dir=str(tmp_path)).run()
    assert (tmp_path / "model.pt").is_file()


def test_a_loss_that_is_no_number_stops_the_training(tmp_path, phantom_dir, workflow):
    overrides = {**TINY, "dataset_dir": str(phantom_dir), "output_dir": str(tmp_path), "ckpt_dir": str(tmp_path)}
    flow = workflow(["train", "tasks/phantom.yaml"], **overrides)
    with torch.no_grad():
        flow.trainer.network.stem.weight.fill_(float("nan"))
    with pytest.raises(Exception) as error:
        flow.run()
    assert "training loss is nan in epoch 1" in root_cause(error.value)


def test_data_folders(tmp_path, phantom_dir):
    assert class_names(phantom_dir, ["a", "b"]) == list(PHANTOM_CLASSES[:5])
    assert class_names(phantom_dir / "imagesTs", ["a", "b"]) == list(PHANTOM_CLASSES[:5])
    assert class_names(tmp_path, ["a", "b"]) == ["a", "b"]
    assert channel_count(phantom_dir, 4) == 1 and channel_count(tmp_path, 4) == 4
    assert len(image_list(phantom_dir)) == 2 and len(image_list(phantom_dir / "imagesTr")) == 6
    with pytest.raises(FileNotFoundError, match="holds no volume"):
        image_list(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        image_list(tmp_path / "nowhere")


# --- precision and metrics --------------------------------------------------------------------------------------------


def test_trains_in_bf16_and_channels_last(tmp_path, phantom_dir, workflow):
    overrides = {**TINY, "precision": "bf16", "channels_last": "true", "max_epochs": 1, "cache_rate": 0.0}
    overrides |= {"dataset_dir": str(phantom_dir), "ckpt_dir": str(tmp_path), "output_dir": str(tmp_path)}
    flow = workflow(["train", "tasks/phantom.yaml"], **overrides)
    seen = set()
    conv = next(m for m in flow.network_def.modules() if isinstance(m, torch.nn.Conv3d) and m.in_channels > 1)
    conv.register_forward_hook(lambda module, inputs, output: seen.add((output.stride(1), output.dtype)))
    flow.run()
    assert seen == {(1, torch.bfloat16)}
    assert np.isfinite(flow.trainer.state.metrics["train_mean_loss"])
    assert conv.weight.dtype == torch.float32
    assert conv.weight.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("inferer", [SimpleInferer(), SlidingWindowInferer((9, 9, 9), mode="gaussian")])
def test_autocast_inferer(inferer):
    network = torch.nn.Conv3d(1, 2, 3, padding=1)
    volume = MetaTensor(torch.rand(1, 1, 12, 10, 9))
    expected = inferer(volume, network)
    assert torch.equal(AutocastInferer(inferer)(volume, network), expected)
    reduced = AutocastInferer(inferer, "bf16", channels_last=True)(volume, network)
    assert reduced.dtype == torch.float32
    assert 0 < (reduced - expected).abs().max() < 0.02
    AutocastInferer(SimpleInferer(), "bf16")(volume, network).sum().backward()
    assert network.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("convolution", [torch.nn.Conv3d, torch.nn.ConvTranspose3d])
def test_small_volumes_stay_in_float32_on_a_cpu(convolution):
    """oneDNN's bfloat16 weight gradients are wrong for them, in any network."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 8, 2, stride=2), convolution(8, 8, 5, padding=2))
    dtypes = {}
    network[0].register_forward_hook(lambda module, inputs, output: dtypes.update(large=output.dtype))
    network[1].register_forward_hook(lambda module, inputs, output: dtypes.update(small=output.dtype))
    volume = torch.rand(2, 1, 10, 12, 20)

    def gradient(precision: str) -> torch.Tensor:
        AutocastInferer(SimpleInferer(), precision)(volume, network).square().mean().backward()
        found, network[1].weight.grad = network[1].weight.grad.clone(), None
        return found

    expected = gradient("fp32")
    for _ in range(4):
        torch.full((2_000_000,), float("nan"))  # freed at once: what uninitialised memory then holds
        torch.testing.assert_close(gradient("bf16"), expected, rtol=0.1, atol=0.1 * expected.abs().max().item())
        assert dtypes == {"large": torch.bfloat16, "small": torch.float32}


def test_autocast_inferer_refuses():
    with pytest.raises(ValueError, match="fp8"):
        AutocastInferer(SimpleInferer(), "fp8")
    with pytest.raises(ValueError, match="needs a CUDA device, not cpu"):
        AutocastInferer(SimpleInferer(), "fp16")(torch.rand(1, 1, 8, 8, 8), torch.nn.Identity())
