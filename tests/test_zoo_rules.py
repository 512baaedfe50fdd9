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
"""The rules of MONAI's model zoo, kept by the repository and by a release that was fetched with its weights."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from monai.bundle import ConfigParser, verify_metadata, verify_net_in_out
from monai.utils import optional_import

from scripts.release.make import LIMIT
from tests.conftest import BUNDLE_ROOT

SCHEMA = Path(__file__).parent / "metadata_schema.json"
TRAIN = (
    "bundle_root device dataset_dir output_dir network_def train#trainer train#trainer#max_epochs train#dataset "
    "train#dataset#data train#handlers train#preprocessing train#inferer train#key_metric validate#evaluator "
    "validate#handlers validate#dataset validate#dataset#data validate#preprocessing validate#postprocessing "
    "validate#inferer validate#key_metric val_interval"
)
INFERENCE = "bundle_root device dataset_dir output_dir network_def inferer preprocessing postprocessing"


@pytest.fixture(params=["repository", "release"])
def root(request: pytest.FixtureRequest) -> Path:
    """The bundle's folder."""
    return BUNDLE_ROOT if request.param == "repository" else request.getfixturevalue("released").root


def metadata_of(root: Path) -> dict:
    return json.loads((root / "configs" / "metadata.json").read_text())


def test_files(released):
    with_weights = yaml.safe_load((released.root / "large_files.yml").read_text())["large_files"]
    assert [entry["path"] for entry in with_weights] == ["models/model.pt"]
    assert all(
        entry["url"] and len(entry["hash_val"]) == 64 and entry["hash_type"] == "sha256" for entry in with_weights
    )
    for file in ("LICENSE", "configs/metadata.json", "docs/README.md", "docs/data_license.txt", "models/model.pt"):
        assert (released.root / file).stat().st_size > 0, file
    for name in ("inference.json", "train.json"):
        assert (released.root / "configs" / name).is_file()
    files = [file for file in released.root.rglob("*") if file.is_file() and "models" not in file.parts]
    assert files and max(file.stat().st_size for file in files) <= LIMIT <= 25 * 1024**2
    assert re.fullmatch(r"[A-Za-z0-9_]+", released.root.name) and not re.search(r"_v\d", released.root.name)


def test_version_is_in_the_changelog(root):
    meta = metadata_of(root)
    assert meta["version"] in meta["changelog"]
    numbers = [tuple(map(int, version.split("."))) for version in meta["changelog"]]
    assert numbers == sorted(numbers, reverse=True) and meta["version"] == next(iter(meta["changelog"]))


@pytest.mark.parametrize(("config", "keys"), [("train.json", TRAIN), ("inference.json", INFERENCE)])
def test_keys(config, keys, root):
    parser = ConfigParser(ConfigParser.load_config_file(root / "configs" / config))
    assert [key for key in keys.split() if key not in parser] == []


def test_validation_interval(root):
    train = ConfigParser.load_config_file(root / "configs" / "train.json")
    (handler,) = (entry for entry in train["train"]["handlers"] if entry["_target_"] == "ValidationHandler")
    assert re.search(r"@val_interval\b", handler["interval"])


def test_no_personal_paths_and_files_in_form(root):
    absolute = re.compile(r"""(?<!\+ )["'](/|~|[A-Za-z]:\\)""")  # but for what is joined: @bundle_root + '/data'
    assert absolute.search('"/home/me"') and absolute.search("$open('/home/me')")
    for file in (root / "configs").rglob("*.*"):
        text = file.read_text()
        assert not absolute.search(text), file.name
        if file.suffix == ".json":
            assert text == json.dumps(json.loads(text), indent=4) + "\n", file.name


@pytest.mark.parametrize("config", ["train.json", "inference.json"])
def test_network_agrees_with_metadata(config, root, tmp_path):
    verify_net_in_out(
        "network_def",
        meta_file=str(root / "configs" / "metadata.json"),
        config_file=str(root / "configs" / config),
        bundle_root=str(root),
        dataset_dir=str(tmp_path),
        device="cpu",
    )
    parser = ConfigParser(ConfigParser.load_config_file(root / "configs" / config))
    for tensors in metadata_of(root)["network_data_format"].values():
        for tensor in tensors.values():
            assert tensor["spatial_shape"] == parser.get_parsed_content("patch_size")


# --- the form of metadata.json ----------------------------------------------------------------------------------------


@pytest.fixture
def schema(tmp_path) -> str:
    """A copy where MONAI looks before it downloads one."""
    if not optional_import("jsonschema")[1]:
        pytest.skip("verify_metadata needs jsonschema")
    return str(shutil.copy(SCHEMA, tmp_path / "schema.json"))


def test_metadata_is_in_form(root, schema):
    verify_metadata(str(root / "configs" / "metadata.json"), filepath=schema)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("version", None),
        ("version", "1.0"),
        ("changelog", {}),
        ("required_packages_version", None),
        ("optional_packages_version", {"nibabel": "5"}),
        ("description", " "),
        ("eval_metrics", {"mean_dice": "0.9"}),
        ("network_data_format#inputs#image", None),
        ("network_data_format#outputs#pred#num_channels", 0),
        ("network_data_format#outputs#pred#channel_def", {"background": 0}),
        ("network_data_format#inputs#image#value_range", [0]),
    ],
)
def test_metadata_out_of_form_is_refused(place, value, schema, tmp_path):
    meta = metadata_of(BUNDLE_ROOT)
    *folders, name = place.split("#")
    node = meta
    for folder in folders:
        node = node[folder]
    if value is None:
        del node[name]
    else:
        node[name] = value
    (tmp_path / "metadata.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="Failed validating"):
        verify_metadata(str(tmp_path / "metadata.json"), filepath=schema)


@pytest.mark.parametrize("tool", [("black", "--check"), ("isort", "--check"), ("flake8",)], ids=lambda tool: tool[0])
def test_style(tool):
    """With the settings in pyproject.toml and .flake8."""
    pytest.importorskip(tool[0])
    command = [sys.executable, "-m", *tool, "scripts", "tests"]
    result = subprocess.run(command, cwd=BUNDLE_ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
