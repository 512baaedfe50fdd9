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
import sys
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

from scripts.emissions import Emissions
from tests.conftest import BUNDLE_ROOT, TINY


@pytest.fixture(scope="module", autouse=True)
def with_mlflow():
    """Which tests/quick_start hides."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH", raising=False)
        for name in ("mlflow", "sklearn"):
            if sys.modules.get(name, sys) is None:
                patch.delitem(sys.modules, name)
        yield


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, phantom_dir, run_bundle, with_mlflow) -> Path:
    """The folder of a training with all that it can leave."""
    pytest.importorskip("mlflow")
    runs = tmp_path_factory.mktemp("runs")
    settings = {key: value for key, value in TINY.items() if key != "pictures"} | {"dataset_dir": phantom_dir}
    overlays = ["tasks/phantom.yaml", "options/run_folder.yaml", "options/emissions.yaml"]
    output = f"$@bundle_root + '/{os.path.relpath(runs, BUNDLE_ROOT)}/' + @run_name"
    result = run_bundle(["train", *overlays], **settings, output_dir=output, tracking="mlflow", tensorboard=False)
    assert result.returncode == 0, result.stderr[-3000:]
    (folder,) = runs.iterdir()
    return folder


def test_mlflow_has_the_course_of_a_training(tracked, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tracked / 'mlruns.db'}")
    (run,) = client.search_runs(client.get_experiment_by_name("segresmamba").experiment_id)
    assert run.info.status == "FINISHED" and run.info.run_name == tracked.name
    assert run.data.params["patch_size"] == "[32, 32, 32]" and run.data.params["max_epochs"] == "2"
    steps = [entry.step for entry in client.get_metric_history(run.info.run_id, "train_loss")]
    losses = {entry.step: entry.value for entry in client.get_metric_history(run.info.run_id, "train_mean_loss")}
    rows = list(csv.DictReader(open(tracked / "training_curve.csv", encoding="utf-8")))
    assert losses == {int(row["epoch"]): pytest.approx(float(row["train_mean_loss"])) for row in rows}
    assert steps == [1, 2, 3, 4]  # one value for each step
    dice = {entry.step: entry.value for entry in client.get_metric_history(run.info.run_id, "val_mean_dice")}
    assert dice == {int(row["epoch"]): pytest.approx(float(row["val_mean_dice"])) for row in rows}
    assert {"val_dice_liver-like", "val_dice_vessel-like"} < set(run.data.metrics)
    files = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"training_curve.png", "training_curve.csv"} < files
    (config,) = (name for name in files if name.startswith("config_"))
    content = json.loads(Path(client.download_artifacts(run.info.run_id, config, str(tmp_path))).read_text())
    assert content["patch_size"] == [32, 32, 32] and content["spacing"] == [5.0, 5.0, 5.0]


def test_the_folder_of_a_run_says_how_to_repeat_it(tracked, tmp_path, run_bundle):
    found = {file.name for file in tracked.iterdir()}
    assert {"config.json", "environment.json", "training_curve.png", "emissions.csv", "models"} < found
    assert "tensorboard" not in found
    environment = json.loads((tracked / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__ and "--dataset_dir" in environment["command"]
    (emissions,) = csv.DictReader(open(tracked / "emissions.csv", encoding="utf-8"))
    assert float(emissions["duration"]) > 0 and emissions["country_iso_code"] == "DEU"
    config = ConfigParser.load_config_file(tracked / "config.json")
    assert config["channels"] == TINY["channels"] and config["flip_prob"] == 0.0  # the command line's, the task's
    again = run_bundle([str(tracked / "config.json")], output_dir=tmp_path, ckpt_dir=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    one, other = (torch.load(place / "model.pt", weights_only=True) for place in (tracked / "models", tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_emissions_of_a_run_that_is_broken_off(tmp_path):
    pytest.importorskip("codecarbon")
    from ignite.engine import Engine

    def fail(engine, batch):
        raise RuntimeError("broken off")

    engine = Engine(fail)
    Emissions(str(tmp_path), "DEU").attach(engine)
    with pytest.raises(RuntimeError, match="broken off"):
        engine.run([0], max_epochs=1)
    assert len(list(csv.DictReader(open(tmp_path / "emissions.csv", encoding="utf-8")))) == 1
    with pytest.raises(ValueError, match="country must be an ISO code"):
        Emissions(str(tmp_path), "Germany")
