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

import pytest
import torch

from scripts.cross_validation import cross_validation
from scripts.ensemble import Ensemble, join_weights
from tests.conftest import BUNDLE_ROOT, TINY


def test_an_ensemble_is_the_mean(tmp_path):
    networks = [torch.nn.Conv3d(1, 2, 3) for _ in range(3)]
    for k, network in enumerate(networks):
        torch.save(network.state_dict() if k else {"model": network.state_dict()}, tmp_path / f"{k}.pt")
    path = join_weights([tmp_path / f"{k}.pt" for k in range(3)], tmp_path / "ensemble.pt")
    ensemble = Ensemble(torch.nn.Conv3d(1, 2, 3), 3)
    ensemble.load_state_dict(torch.load(path, weights_only=True))
    volume = torch.rand(1, 1, 8, 8, 8)
    assert torch.allclose(ensemble(volume), sum(network(volume) for network in networks) / 3, atol=1e-6)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        join_weights([tmp_path / "3.pt"], tmp_path / "ensemble.pt")


def test_cross_validation_goes_on_where_it_stopped(phantom_dir, tmp_path, workflow, monkeypatch, capfd):
    """All labelled cases are evaluated once, and the ensemble's evaluation and inference run."""
    names = sorted(file.name.removesuffix(".nii.gz") for file in (phantom_dir / "imagesTr").iterdir())
    settings = {key: value for key, value in TINY.items() if key not in ("num_folds", "max_epochs")}
    settings |= {"max_epochs": 1, "test_cases": names[-2:]}
    (tmp_path / "folds.yaml").write_text('num_folds: "$1 + 1"\n')
    given = {"config_file": ["configs/tasks/phantom.yaml", str(tmp_path / "folds.yaml")], "parallel": 2, **settings}
    monkeypatch.chdir(BUNDLE_ROOT)
    cross_validation(str(phantom_dir), str(tmp_path / "cv"), **given)
    summary = json.loads((tmp_path / "cv" / "summary.json").read_text())
    assert summary["cases"] == 4 and "4 cases, each by the network" in capfd.readouterr().out
    pooled = []
    for fold in range(2):
        raw = tmp_path / "cv" / f"cross_validation-fold{fold}-seed0" / "evaluation" / "val_mean_dice_raw.csv"
        pooled += [float(row["mean"]) for row in csv.DictReader(open(raw))]
    assert sum(pooled) / 4 == pytest.approx(summary["val_mean_dice"]["mean"]["mean"], abs=1e-4)
    assert json.loads((tmp_path / "cv" / "test" / "summary.json").read_text())["cases"] == 2

    places = {"dataset_dir": phantom_dir, "ckpt_dir": tmp_path / "cv" / "models", "output_dir": tmp_path / "out"}
    places = {key: str(path) for key, path in places.items()}
    shape = {key: TINY[key] for key in ("channels", "depths", "full_resolution_skip", "patch_size", "spacing")}
    overlays = ["inference", "tasks/phantom.yaml", "options/ensemble.yaml"]
    workflow(overlays, "inference", **places, **shape, num_networks=2, device="cpu", pictures=False).run()
    assert len(list((tmp_path / "out").glob("*_seg.nii.gz"))) == 2

    kept = [tmp_path / "cv" / "cross_validation-fold1-seed0" / "models" / "last.pt", tmp_path / "cv/test/summary.json"]
    written = [file.stat().st_mtime_ns for file in kept]
    cross_validation(str(phantom_dir), str(tmp_path / "cv"), **given)
    assert capfd.readouterr().out.count("done before") == 2
    assert [file.stat().st_mtime_ns for file in kept] == written
    assert json.loads((tmp_path / "cv" / "summary.json").read_text()) == summary
    for other, message in (
        ({"seed": 1}, "of another cross-validation"),
        ({"weight_decay": 1}, "with other settings"),
        ({"checkpoint": "models/model.pt"}, "checkpoint cannot be set here: each fold has its own"),
        ({"fold": 1}, "fold cannot be set here"),
        ({"config_file": ["configs/tasks/fantom.yaml"]}, "There is no config file configs/tasks/fantom.yaml"),
    ):
        with pytest.raises(ValueError, match=message):
            cross_validation(str(phantom_dir), str(tmp_path / "cv"), **{**given, **other})
