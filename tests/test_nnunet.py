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

import importlib.util
import json
import os

import pytest

from scripts.datalist import load_datalist
from scripts.nnunet import nnunet
from tests.conftest import BUNDLE_ROOT


@pytest.mark.skipif(importlib.util.find_spec("nnunetv2") is None, reason="no nnU-Net: pip install nnunetv2")
def test_it_is_trained_and_measured_on_a_fold_of_the_bundle(phantom_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(BUNDLE_ROOT)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_compile"):
        monkeypatch.setenv(name, "")  # put back afterwards
    given = {"fold": 1, "num_folds": 3, "num_epochs": 1, "iterations_per_epoch": 1, "device": "cpu"}
    places = {"output_dir": str(tmp_path / "run"), "results_dir": str(tmp_path / "results")}
    nnunet(str(phantom_dir), **places, **given)
    result = json.loads((tmp_path / "results" / "nnunet-fold1.json").read_text())
    held_out = load_datalist(phantom_dir, "validation", fold=1, num_folds=3)
    assert set(result["cases"]) == {os.path.basename(item["image"]) for item in held_out}
    assert result["summary"]["cases"] == 2 and result["parameters"] > 1e6
    assert {"val_mean_dice", "val_hd95"} <= set(result["summary"])

    (weights,) = (tmp_path / "run" / "nnUNet_results").rglob("checkpoint_final.pth")
    written = weights.stat().st_mtime_ns
    nnunet(str(phantom_dir), **places, **given)
    assert weights.stat().st_mtime_ns == written  # trained once
    with pytest.raises(ValueError, match="is of a training with other settings"):
        nnunet(str(phantom_dir), **places, **{**given, "num_epochs": 2})


@pytest.mark.skipif(importlib.util.find_spec("nnunetv2") is not None, reason="nnU-Net is here")
def test_without_it_the_error_says_what_to_install(tmp_path):
    with pytest.raises(ValueError, match="pip install nnunetv2"):
        nnunet(str(tmp_path), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
