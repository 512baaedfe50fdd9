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

import pytest

from scripts.experiments import experiments, planned_runs
from tests.conftest import BUNDLE_ROOT, TINY

PLAN = {
    "configs": ["configs/tasks/phantom.yaml"],
    "overrides": {**{key: value for key, value in TINY.items() if key != "pictures"}, "max_epochs": 1},
    "folds": [0, 2],
    "arms": {"plain": None, "without_tom": {"overrides": {"use_tom": False}}},
}


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps(PLAN))
    return path


def test_the_runs_of_a_plan(plan):
    runs = list(planned_runs(str(plan)))
    assert [run.name for run in runs] == [
        "plain-fold0-seed0",
        "without_tom-fold0-seed0",
        "plain-fold2-seed0",
        "without_tom-fold2-seed0",
    ]
    assert runs[1].overrides == {**PLAN["overrides"], "use_tom": False} and runs[1].configs == tuple(PLAN["configs"])


def test_arms_have_their_own_folds_and_seeds(tmp_path):
    arms = {"plain": {"seeds": [0, 1]}, "other": {"folds": [1]}}
    (tmp_path / "plan.yaml").write_text(json.dumps({**PLAN, "arms": arms}))
    names = [run.name for run in planned_runs(str(tmp_path / "plan.yaml"))]
    assert names[:3] == ["plain-fold0-seed0", "other-fold1-seed0", "plain-fold2-seed0"]
    assert names[3:] == ["plain-fold0-seed1", "plain-fold2-seed1"]


def test_one_may_stand_without_brackets(tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("{configs: one.yaml, folds: 1, arms: {a: {seeds: 2}, b: {configs: two.yaml}}}")
    runs = {run.name: run.configs for run in planned_runs(str(plan))}
    assert runs == {"a-fold1-seed2": ("one.yaml",), "b-fold1-seed0": ("one.yaml", "two.yaml")}
    for content in ("{folds: '0, 1', arms: {a: }}", "{arms: {a: {folds: }}}"):
        plan.write_text(content)
        with pytest.raises(ValueError, match="plan.yaml: folds must be a whole number or a list of them"):
            list(planned_runs(str(plan)))


def test_runs_are_done_once_and_go_on_where_they_stopped(phantom_dir, tmp_path, monkeypatch, capfd):
    plan = tmp_path / "plan.yaml"
    overrides = {**PLAN["overrides"], "checkpoint": "$@ckpt_dir + '/last.pt'"}  # evaluation's alone
    overrides["learning_rate"] = 1e-4  # with more, so few steps end at background everywhere
    arms = {"plain": None, "flipped": {"weights_of": "plain", "overrides": {"flip_axes": [0, 1, 2]}}}
    plan.write_text(json.dumps({**PLAN, "overrides": overrides, "folds": [2], "arms": arms}))
    folders = {name: tmp_path / name for name in ("runs", "results")}
    places = [str(phantom_dir), *(str(folder) for folder in folders.values())]
    monkeypatch.chdir(BUNDLE_ROOT)
    experiments(str(plan), *places, parallel=2)
    assert "done before" not in capfd.readouterr().out
    written = {file.name: json.loads(file.read_text()) for file in folders["results"].iterdir()}
    assert set(written) == {f"{run.name}.json" for run in planned_runs(str(plan))}
    one = written["plain-fold2-seed0.json"]
    assert len(one["curve"]) == 1 and one["summary"]["cases"] == 2
    dice = [values["val_mean_dice"]["liver-like"] for values in one["cases"].values()]
    assert sum(dice) / 2 == pytest.approx(one["summary"]["val_mean_dice"]["liver-like"]["mean"], abs=1e-4)

    flipped = written["flipped-fold2-seed0.json"]
    assert flipped["weights_of"] == "plain" and not (folders["runs"] / "flipped-fold2-seed0" / "models").exists()
    assert flipped["summary"] != one["summary"]

    lost = folders["results"] / "plain-fold2-seed0.json"
    lost.unlink()
    before = {file.name: file.stat().st_mtime_ns for file in folders["results"].iterdir()}
    checkpoint = folders["runs"] / "plain-fold2-seed0" / "models" / "last.pt"
    trained = checkpoint.stat().st_mtime_ns
    shutil.rmtree(folders["runs"] / "plain-fold2-seed0" / "evaluation")
    experiments(str(plan), *places)
    assert capfd.readouterr().out.count("done before") == 1
    assert json.loads(lost.read_text())["summary"] == written[lost.name]["summary"]
    assert checkpoint.stat().st_mtime_ns == trained  # evaluated again, not trained again
    assert all((folders["results"] / name).stat().st_mtime_ns == time for name, time in before.items())

    changed = folders["runs"] / "plain-fold2-seed0" / "settings.json"
    kept = json.loads(changed.read_text())
    with pytest.raises(
        ValueError, match="settings.json is of a run with other settings .*dataset_dir: .*phantom.* then, .* now"
    ):
        experiments(str(plan), str(tmp_path), *places[1:])
    changed.write_text(json.dumps({**kept, "overlays_sha256": "that of the overlay before it was edited"}))
    with pytest.raises(
        ValueError, match="run with other settings .overlays_sha256: that of the overlay before it was edited then"
    ):
        experiments(str(plan), *places)
    changed.write_text(json.dumps({**kept, "cases": "7 cases, 0123456789ab"}))  # as were there then
    with pytest.raises(ValueError, match="run with other settings .cases: 7 cases, .* then, 6 cases, .* now.:"):
        experiments(str(plan), *places)
    changed.write_text(json.dumps(kept))

    plan.write_text(json.dumps({**PLAN, "folds": [2], "overrides": {**PLAN["overrides"], "learning_rate": 0.1}}))
    with pytest.raises(ValueError, match="plain-fold2-seed0.json is of a run with other settings"):
        experiments(str(plan), *places)


def test_an_arm_that_evaluates_the_weights_of_another(tmp_path):
    arms = {
        "plain": {"overrides": {"spacing": [4, 4, 4]}},
        "flipped": {"weights_of": "plain", "overrides": {"flip_axes": [0]}},
        "other": None,
    }
    plan = tmp_path / "plan.yaml"
    plan.write_text(json.dumps({**PLAN, "arms": arms, "folds": [0]}))
    plain, other, flipped = planned_runs(str(plan))
    assert (plain.arm, other.arm, flipped.arm) == ("plain", "other", "flipped")  # which waits for the first
    assert flipped.overrides == {**plain.overrides, "flip_axes": [0]} and flipped.configs == plain.configs
    places = [str(tmp_path / name) for name in ("data", "runs", "results")]
    with pytest.raises(FileNotFoundError, match="plain-fold0-seed0 holds no training: run plain there"):
        experiments(str(plan), *places, arms="flipped")
    with pytest.raises(ValueError, match="there is no arm 'fliped'"):
        experiments(str(plan), *places, arms="flipped,fliped")
    trained_itself = {key: value for key, value in flipped.settings.items() if key != "weights_of"}
    for file, before in (
        (tmp_path / "results" / "flipped-fold0-seed0.json", trained_itself),
        (tmp_path / "runs" / "plain-fold0-seed0" / "settings.json", other.settings),  # otherwise trained
    ):
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(before))
        begun = tmp_path / "runs" / "plain-fold0-seed0" / "models" / "last.pt"
        begun.parent.mkdir(parents=True, exist_ok=True)
        begun.touch()
        with pytest.raises(ValueError, match=f"{file.name} is of a run with other settings"):
            experiments(str(plan), *places, arms="flipped")
        file.unlink()
        shutil.rmtree(begun.parents[1])


def test_a_run_that_failed_before_it_began_keeps_no_settings(plan, phantom_dir, tmp_path, monkeypatch):
    """So that a typo does not stand in the way of what was meant."""
    monkeypatch.chdir(BUNDLE_ROOT)
    plan.write_text(json.dumps({**PLAN, "folds": 0}))
    places = [str(phantom_dir), str(tmp_path / "runs"), str(tmp_path / "results")]
    folder = tmp_path / "runs" / "plain-fold0-seed0"
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps({"overrides": {"patchsize": [8, 8, 8]}}))
    experiments(str(plan), *places, arms="plain")
    assert "patchsize" not in (folder / "settings.json").read_text()


def test_a_failing_run_says_why(plan, tmp_path):
    with pytest.raises(ChildProcessError, match="training of plain-fold0-seed0 failed.*(\n.*)*does not exist"):
        experiments(str(plan), str(tmp_path / "nowhere"), str(tmp_path / "runs"), str(tmp_path / "results"))
    assert not (tmp_path / "results").exists()
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == ["plain-fold0-seed0"]  # none begun after it


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**PLAN, "seed": [1]}, "unknown: seed"),
        ({"folds": [0]}, "expected 'arms', by name"),
        ({**PLAN, "arms": {"a": "ema.yaml"}}, "expected 'arms', by name"),
        ({**PLAN, "arms": {}}, "expected the keys"),
        ([1], "expected 'arms', by name"),
        ({**PLAN, "overrides": {"fold": 3}}, "fold cannot be among the overrides: the runner sets it"),
        ({**PLAN, "arms": {"a": {"overrides": {"seed": 3}}}}, "seed cannot be among the overrides"),
        ({**PLAN, "arms": {"a": {"override": {}}}}, "unknown: override"),
        (
            {**PLAN, "arms": {"b": {"weights_of": "a"}, "a": None}},
            "weights_of of b: there is no training a-fold0-seed0 above it",
        ),
        ({**PLAN, "arms": {"a": None, "b": {"weights_of": "a", "seeds": [1]}}}, "no training a-fold0-seed1 above"),
    ],
)
def test_bad_plans(content, message, tmp_path):
    (tmp_path / "plan.yaml").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        list(planned_runs(str(tmp_path / "plan.yaml")))
    with pytest.raises(ValueError, match="no such file"):
        list(planned_runs(str(tmp_path / "other.yaml")))
    (tmp_path / "plan.yaml").write_text("arms: {a: [}")
    with pytest.raises(ValueError, match="plan.yaml cannot be read: "):
        list(planned_runs(str(tmp_path / "plan.yaml")))


def test_what_a_plan_leaves_empty(tmp_path):
    (tmp_path / "plan.yaml").write_text("overrides:\narms:\n  a:\n    overrides:\n")
    (run,) = planned_runs(str(tmp_path / "plan.yaml"))
    assert run.overrides == {} and run.configs == ()


def test_a_config_that_is_not_there(tmp_path, phantom_dir, monkeypatch):
    monkeypatch.chdir(BUNDLE_ROOT)
    (tmp_path / "plan.yaml").write_text("arms: {a: {configs: [configs/tasks/fantom.yaml]}}")
    with pytest.raises(ValueError, match="There is no config file configs/tasks/fantom.yaml"):
        experiments(str(tmp_path / "plan.yaml"), str(phantom_dir), str(tmp_path / "runs"), str(tmp_path / "results"))
