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
import logging
import re
import shlex

import numpy as np
import pytest

from scripts.preflight import check_keys, preflight, version_differences

PROGRAM = "/venv/lib/monai/bundle/__main__.py"
TRAIN = ["--config_file", "['configs/train.json','configs/tasks/phantom.yaml']"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--datasetdir", "x"], r"configs/train\.json, configs/tasks/phantom\.yaml: --datasetdir \(did you mean --dat"),
        (["--max_epochs=3", "--maxepochs=3"], r"--maxepochs \(did you mean --max_epochs\?\)\.$"),
        (["--train#trainr#amp", "True"], r"--train#trainr#amp \(did you mean --train#trainer\?\)"),
        (["--train::trainr::amp", "True"], r"--train::trainr::amp \(did you mean --train#trainer\?\)"),
        (["--augmentation#9#prob", "1"], "--augmentation#9#prob"),
        (["--augmentation#1#prob#x", "1", "--xyzzy", "2"], r"json, configs/tasks/phantom\.yaml: --xyzzy\.$"),
        (["-datasetdir", "x"], r"--datasetdir \(did you mean --dataset_dir\?\)"),
        (["--check", "1", "--sw_overlap", "@check_data"], "--check "),
        (["--noresum"], r"--noresum \(did you mean --resume\?\)"),
    ],
)
def test_unknown_keys_are_refused(options, message, bundle_root, monkeypatch):
    monkeypatch.chdir(bundle_root)
    with pytest.raises(ValueError, match=message):
        check_keys([PROGRAM, "run", *TRAIN, *options])


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--max_epochs", "3", "--train#trainer#amp", "True", "--augmentation#1#prob", "0.3", "--resume"],
        ["--network_def#dropout", "0.1"],  # an argument that a component may have
        ["--sigma", "3", "--augmentation#1#std", "@sigma"],  # a key of one's own that is used
        ["--tracking", "mlflow", "--run_name", "a"],
        ["--max-epochs", "7", "--noresume", "--flip_prob", "-1", "--pretrained=--odd"],
        ["--x", "3", "--max_epochs", "%x"],
        ["--validate#additional_metrics#surface", "@validate#key_metric", "--train#handlers#0#own#deeper", "1"],
        ["--workflow_type", "train", "--_meta_#version", "1", "--", "--verbose"],
        ["--meta_file", "configs/metadata.json", "--logging_file", "configs/logging.conf", "--run_id", "run"],
    ],
)
def test_known_keys_pass(options, bundle_root, monkeypatch):
    monkeypatch.chdir(bundle_root)
    check_keys([PROGRAM, "run", *TRAIN, *options])


def test_keys_of_a_file_of_arguments(bundle_root, tmp_path, monkeypatch):
    monkeypatch.chdir(bundle_root)
    arguments = {"config_file": ["configs/inference.json"], "sw_overlap": 0.5, "network_def#d_state": 8}
    (tmp_path / "good.json").write_text(json.dumps(arguments))
    check_keys([PROGRAM, "run", "--args_file", str(tmp_path / "good.json")])
    (tmp_path / "bad.json").write_text(json.dumps({**arguments, "sw_overlp": 0.5}))
    with pytest.raises(ValueError, match=r"--sw_overlp \(did you mean --sw_overlap\?\)"):
        check_keys([PROGRAM, "run", "--args_file", str(tmp_path / "bad.json")])


def test_the_pages_name_keys_that_there_are(bundle_root, monkeypatch):
    monkeypatch.chdir(bundle_root)
    checked = 0
    for page in [bundle_root / "README.md", *(bundle_root / "docs").glob("*.md")]:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                _, found, options = line.partition("monai.bundle run ")
                if found and "mine.yaml" not in options:
                    check_keys([PROGRAM, "run", *shlex.split(options)])
                    checked += 1
    assert checked > 10


def test_other_programs_are_let_pass():
    check_keys(["/venv/bin/pytest", "run", *TRAIN, "--datasetdir", "x"])
    check_keys([PROGRAM, "download", "--nme", "x"])


def test_a_key_that_an_overlay_refers_to_is_none_too_many(bundle_root, tmp_path):
    (tmp_path / "mine.yaml").write_text('learning_rate: "@my_rate"')
    files = f"['{bundle_root}/configs/train.json','{tmp_path}/mine.yaml']"
    check_keys([PROGRAM, "run", "--config_file", files, "--my_rate", "0.1"])


def test_a_slip_of_the_pen_is_one_clear_error(tmp_path, run_bundle):
    result = run_bundle(["train"], datasetdir=tmp_path)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert (
        "Error: there is no such key in configs/train.json: --datasetdir (did you mean --dataset_dir?)."
        in result.stderr
    )


def test_versions(tmp_path, caplog):
    content = {"monai_version": "0.1.0", "pytorch_version": "1.0.0", "numpy_version": np.__version__}
    content["required_packages_version"] = {"nibabel": ">=1,<2", "scipy": ">=1", "no-such-package": ">=1"}
    (tmp_path / "metadata.json").write_text(json.dumps(content))
    found = version_differences(tmp_path / "metadata.json")
    assert [phrase.split()[0] for phrase in found] == ["monai", "torch", "nibabel", "no-such-package"]
    assert found[2].endswith("(tested: <2,>=1)") and "missing" in found[3]
    with caplog.at_level(logging.INFO):
        preflight(tmp_path / "metadata.json", "cpu", weights="model.pt, 3 tensors", data=None)
    first, *others = caplog.records
    lines = first.getMessage().splitlines()
    assert lines[0] == "Preflight" and lines[-1].split(None, 1) == ["weights", "model.pt, 3 tensors"]
    assert [record.levelname for record in others] == ["WARNING"] * 4


def test_folders_that_cannot_be_written_to(tmp_path, phantom_dir, run_bundle):
    (tmp_path / "file").touch()
    places = {"dataset_dir": phantom_dir, "output_dir": tmp_path, "ckpt_dir": tmp_path / "file" / "models"}
    result = run_bundle(["train", "tasks/phantom.yaml"], **places, check_data=False)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert f"Error: nothing can be written to {tmp_path}/file/models (Not a directory): give another --ckpt_dir." in (
        result.stderr
    )


def test_this_environment_is_one_that_was_tested(bundle_root):
    assert version_differences(bundle_root / "configs" / "metadata.json") == []
