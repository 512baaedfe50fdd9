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

import nibabel as nib
import numpy as np
import pytest

from scripts.datalist import load_datalist
from scripts.label_maps import load_label_maps
from scripts.report import read_evaluations

CONFIGS = ["train", "evaluate", "tasks/phantom.yaml", "options/label_maps.yaml"]


@pytest.fixture
def label_maps(phantom_dir, tmp_path):
    """Of the three cases of fold 1: the reference, one named as inference does, and one without its first class."""
    folder = tmp_path / "maps"
    folder.mkdir()
    first, second, third = (item["label"] for item in load_datalist(phantom_dir, "validation", fold=1, num_folds=2))
    shutil.copy(first, folder)
    shutil.copy(second, folder / second.rpartition("/")[2].replace(".nii.gz", "_seg.nii.gz"))
    label = nib.load(third)
    values = np.asarray(label.dataobj)
    nib.save(
        nib.Nifti1Image(np.where(values == 1, 0, values).astype(np.uint8), label.affine),
        folder / third.rpartition("/")[2],
    )
    return folder


def settings(phantom_dir, label_maps, tmp_path):
    places = {"dataset_dir": str(phantom_dir), "label_maps": str(label_maps), "output_dir": str(tmp_path / "out")}
    return {**places, "fold": 1, "num_folds": 2, "device": "cpu"}


def test_they_are_measured_as_a_network_is(phantom_dir, label_maps, tmp_path, workflow):
    data = shutil.copytree(phantom_dir, tmp_path / "phantoms, drawn")  # MONAI's tables have no quotes
    workflow(CONFIGS, "evaluation", **settings(data, label_maps, tmp_path)).run()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["cases"] == 3
    dice = {label: values["mean"] for label, values in summary["val_mean_dice"].items()}
    lost = dice.pop("liver-like")
    assert lost == pytest.approx(2 / 3) and dice.pop("mean") == pytest.approx((lost + len(dice)) / (1 + len(dice)))
    assert set(dice.values()) == {1.0}
    assert summary["val_hd95"]["spleen-like"]["mean"] == 0 and summary["val_hd95"]["liver-like"]["mean"] > 10
    (metrics,) = read_evaluations(tmp_path / "out").values()
    images = {
        item["image"].rpartition("/")[2] for item in load_datalist(phantom_dir, "validation", fold=1, num_folds=2)
    }
    assert set(metrics["val_mean_dice"]) == images  # so that a report finds them beside a network's


def test_on_another_grid_they_are_refused(phantom_dir, label_maps, tmp_path, workflow):
    file = sorted(label_maps.iterdir())[0]
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8), np.uint8), np.eye(4)), file)
    with pytest.raises(RuntimeError) as caught:
        workflow(CONFIGS, "evaluation", **settings(phantom_dir, label_maps, tmp_path)).run()
    assert "differs from the image's (8, 8, 8)" in str(caught.value.__cause__ or caught.value)
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named(phantom_dir, label_maps, tmp_path):
    file = sorted(label_maps.iterdir())[0]
    file.unlink()
    arguments = {"dataset_dir": phantom_dir, "subset": "validation", "fold": 1, "num_folds": 2}
    with pytest.raises(FileNotFoundError, match=f"holds no label map of case .*: expected {file.name}"):
        load_label_maps(label_maps, **arguments)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_label_maps(tmp_path / "nowhere", **arguments)
    with pytest.raises(ValueError, match="give --label_maps"):
        load_label_maps("", **arguments)
    unlabelled = shutil.copytree(phantom_dir, tmp_path / "data", ignore=shutil.ignore_patterns("labelsTs"))
    with pytest.raises(ValueError, match="case phantom_test_000 has no label to compare with"):
        load_label_maps(label_maps, dataset_dir=unlabelled, subset="test")
