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

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.transforms import RandGaussianNoise

from scripts.resume import EpochSeed
from tests.conftest import TINY


def losses(flow, stop_after: int | None = None) -> list[float]:
    """Run a training and return the loss of every iteration; end it after an epoch as an interruption would."""
    seen = []
    trainer = flow.trainer
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: seen.append(float(engine.state.output[0]["loss"]))
    )
    if stop_after is not None:
        trainer.add_event_handler(
            Events.EPOCH_STARTED(once=stop_after + 1), lambda engine: engine.terminate(skip_completed=True)
        )
    flow.run()
    return seen


@pytest.fixture(scope="module")
def settings(phantom_dir):
    return {**TINY, "max_epochs": 4, "dataset_dir": str(phantom_dir), "pictures": True}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_training_equals_an_unbroken_one(settings, workflow, tmp_path, num_workers):
    def make(folder, **own):
        places = {"ckpt_dir": str(tmp_path / folder), "output_dir": str(tmp_path / folder)}
        return workflow(["train", "tasks/phantom.yaml"], **{**settings, **places, "num_workers": num_workers, **own})

    whole = make("whole")
    expected = losses(whole)
    first = losses(make("parts"), stop_after=2)
    resumed = make("parts", resume="true")
    second = losses(resumed)

    assert len(expected) == 8 and len(first) == len(second) == 4
    assert torch.allclose(torch.tensor(first + second), torch.tensor(expected), rtol=0, atol=1e-6)
    ends = [torch.load(tmp_path / folder / "last.pt", weights_only=True) for folder in ("whole", "parts")]
    assert ends[0]["trainer"] == ends[1]["trainer"] and ends[0]["trainer"]["iteration"] == 8
    assert ends[0]["validation"] == ends[1]["validation"]
    assert ends[0]["lr_scheduler"]["last_epoch"] == ends[1]["lr_scheduler"]["last_epoch"] == 8
    for key, value in ends[0]["model"].items():
        assert torch.allclose(value, ends[1]["model"][key], atol=1e-6), key
    best = [torch.load(tmp_path / folder / "model.pt", weights_only=True) for folder in ("whole", "parts")]
    assert all(torch.allclose(value, best[1][key], atol=1e-6) for key, value in best[0].items())
    curves = [list(csv.reader(open(tmp_path / f / "training_curve.csv", encoding="utf-8"))) for f in ("whole", "parts")]
    assert [row[0] for row in curves[1]] == [row[0] for row in curves[0]] == ["epoch", "1", "2", "3", "4"]

    if num_workers == 0:  # a worse validation after the resumption leaves the best weights alone
        with pytest.raises(RuntimeError) as error:  # and another plan is refused
            make("parts", resume=True, batch_size=1).run()
        assert "batch_size 2 then, 1 now" in str(error.value.__cause__)
        assert losses(make("parts", resume=True)) == []  # nothing is left to do


def test_worse_validation_after_resumption_keeps_the_best(settings, workflow, tmp_path):
    places = {"ckpt_dir": str(tmp_path), "output_dir": str(tmp_path), "pictures": False}
    losses(workflow(["train", "tasks/phantom.yaml"], **{**settings, **places}), stop_after=1)
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    last["validation"] = {"best_metric": 2.0, "best_metric_epoch": 1}  # better than any that can follow
    torch.save(last, tmp_path / "last.pt")
    (tmp_path / "model.pt").write_bytes(b"the best so far")
    resumed = workflow(["train", "tasks/phantom.yaml"], **{**settings, **places, "resume": True})
    losses(resumed)
    assert (tmp_path / "model.pt").read_bytes() == b"the best so far"
    assert resumed.evaluator.state.best_metric_epoch == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 0.5),
        ("patch_size", [16, 16, 16]),
        ("channels", [8, 24]),
        ("mirror_axes", [1]),
        ("test_cases", ["phantom_000"]),
        ("optimizer#_target_", "torch.optim.NAdam"),
    ],
)
def test_resume_with_other_settings_is_an_error(key, value, settings, workflow, tmp_path):
    places = {"ckpt_dir": str(tmp_path), "output_dir": str(tmp_path)}
    losses(workflow(["train", "tasks/phantom.yaml"], **settings, **places), stop_after=1)
    flow = workflow(["train", "tasks/phantom.yaml"], **{**settings, **places, "resume": True, key: value})
    with pytest.raises(RuntimeError) as error:
        flow.run()
    assert isinstance(error.value.__cause__, ValueError) and key.split("#")[0] in str(error.value.__cause__)


def test_resume_of_a_training_that_knew_fewer_settings(settings, workflow, tmp_path):
    places = {"ckpt_dir": str(tmp_path), "output_dir": str(tmp_path)}
    losses(workflow(["train", "tasks/phantom.yaml"], **settings, **places), stop_after=1)
    checkpoint = torch.load(tmp_path / "last.pt", weights_only=True)
    del checkpoint["plan"]["orientation"]
    torch.save(checkpoint, tmp_path / "last.pt")
    resumed = workflow(["train", "tasks/phantom.yaml"], **{**settings, **places, "resume": True})
    assert len(losses(resumed)) > 0


def test_resume_with_other_cases_is_an_error(settings, workflow, tmp_path):
    """Another list would be shuffled otherwise, and cases that were trained on would be validated."""
    places = {"ckpt_dir": str(tmp_path), "output_dir": str(tmp_path)}
    losses(workflow(["train", "tasks/phantom.yaml"], **settings, **places), stop_after=1)
    checkpoint = torch.load(tmp_path / "last.pt", weights_only=True)
    now = checkpoint["plan"]["training_cases"]
    checkpoint["plan"]["training_cases"] = "7 cases, 0123456789ab"
    torch.save(checkpoint, tmp_path / "last.pt")
    with pytest.raises(RuntimeError) as error:
        workflow(["train", "tasks/phantom.yaml"], **{**settings, **places, "resume": True}).run()
    assert f"training_cases 7 cases, 0123456789ab then, {now} now" in str(error.value.__cause__)


def test_resume_without_checkpoint_is_an_error(settings, workflow, tmp_path):
    flow = workflow(
        ["train", "tasks/phantom.yaml"],
        **{**settings, "resume": True, "ckpt_dir": str(tmp_path), "output_dir": str(tmp_path), "cache_rate": 0.0},
    )
    with pytest.raises(RuntimeError) as error:
        flow.run()
    assert isinstance(error.value.__cause__, FileNotFoundError)
    assert "no training to resume" in str(error.value.__cause__) and str(tmp_path) in str(error.value.__cause__)


@pytest.mark.parametrize(
    "content", [b"no archive", {"conv.weight": torch.ones(2)}, [1, 2]], ids=["bytes", "weights", "list"]
)
def test_a_file_that_is_no_checkpoint_is_an_error(content, settings, workflow, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / "last.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "last.pt")
    places = {"resume": True, "ckpt_dir": str(tmp_path), "output_dir": str(tmp_path), "cache_rate": 0.0}
    with pytest.raises(RuntimeError) as error:
        workflow(["train", "tasks/phantom.yaml"], **{**settings, **places}).run()
    assert isinstance(error.value.__cause__, ValueError)
    assert "last.pt" in str(error.value.__cause__) and "no checkpoint" in str(error.value.__cause__)


def test_failed_writing_leaves_the_old_checkpoint(tmp_path):
    from scripts.resume import TrainingCheckpoint

    handler = TrainingCheckpoint(str(tmp_path), {})
    handler._saver({"epoch": 1}, "last.pt")
    with pytest.raises(Exception, match="pickle"):
        handler._saver({"epoch": 2, "unfit": lambda: None}, "last.pt")
    assert torch.load(tmp_path / "last.pt", weights_only=True) == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_randomness_is_a_function_of_seed_and_epoch(num_workers):
    from types import SimpleNamespace

    def epoch(loader, seed, number):
        engine = SimpleNamespace(state=SimpleNamespace(epoch=number, rank=0), data_loader=loader)
        EpochSeed(seed)(engine)
        return torch.cat(list(loader)).flatten()

    def loader():
        return DataLoader(
            Dataset([torch.zeros(1) + k for k in range(6)], RandGaussianNoise(prob=0.8)), num_workers, shuffle=True
        )

    one = loader()
    epochs = [epoch(one, 0, number) for number in (1, 2, 3)]
    other = loader()
    assert torch.equal(epoch(other, 0, 3), epochs[2])
    assert torch.equal(epoch(other, 0, 1), epochs[0])
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epoch(other, 1, 1), epochs[0])
