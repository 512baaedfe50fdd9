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

"""models/model.pt, as a user of the plain configs gets it."""

from __future__ import annotations

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, load

from tests.conftest import BUNDLE_ROOT
from tests.test_datalist import HIPPOCAMPUS, needs_hippocampus

WEIGHTS = BUNDLE_ROOT / "models" / "model.pt"


def test_weights_are_those_of_the_plain_configs():
    assert WEIGHTS.stat().st_size <= 25e6  # the model zoo's limit for a file
    weights = torch.load(WEIGHTS, weights_only=True)
    for name in ("train.json", "inference.json"):
        parser = ConfigParser(ConfigParser.load_config_file(BUNDLE_ROOT / "configs" / name))
        parser["bundle_root"] = str(BUNDLE_ROOT)
        state = parser.get_parsed_content("network_def").state_dict()
        assert {key: value.shape for key, value in state.items()} == {key: v.shape for key, v in weights.items()}


@pytest.mark.parametrize("kind", ["train", "inference"])
def test_bundle_load(kind, monkeypatch):
    """By the name of the bundle and the folder it lies in; MONAI wants to be in it to find its scripts."""
    monkeypatch.chdir(BUNDLE_ROOT)
    places = {"name": BUNDLE_ROOT.name, "bundle_dir": BUNDLE_ROOT.parent, "workflow_type": kind, "source": "github"}
    network = load(**places, device="cpu").eval()
    weights = torch.load(WEIGHTS, weights_only=True)
    assert type(network).__name__ == "SegResMamba"
    assert all(torch.equal(value, weights[name].float()) for name, value in network.state_dict().items())


@needs_hippocampus
def test_inference_as_it_stands(tmp_path, run_bundle):
    """On cases of the training: whether the weights came through, not how good they are."""
    cases = sorted((HIPPOCAMPUS / "imagesTr").iterdir())[::80]
    for case in cases:
        shutil.copy(case, tmp_path)
    result = run_bundle(["inference"], input=tmp_path, output_dir=tmp_path / "out")
    assert result.returncode == 0, result.stderr[-3000:]
    for case in cases:
        label = nib.load(HIPPOCAMPUS / "labelsTr" / case.name)
        made = nib.load(tmp_path / "out" / case.name.replace(".nii.gz", "_seg.nii.gz"))
        np.testing.assert_allclose(made.affine, label.affine, atol=1e-3)
        one, other = np.asarray(made.dataobj), np.asarray(label.dataobj)
        for k in (1, 2):
            assert 2 * np.sum((one == k) & (other == k)) / (np.sum(one == k) + np.sum(other == k)) > 0.85
        assert (tmp_path / "out" / "pictures" / case.name.replace(".nii.gz", "_overlay.png")).stat().st_size > 5000
    volumes = json.loads((tmp_path / "out" / "cases.json").read_text())
    assert {name for case in volumes.values() for name in case["volumes_ml"]} == {"anterior", "posterior"}
