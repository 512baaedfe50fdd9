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
"""A release: what it holds, and that whoever fetches it gets what the repository does."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from urllib.error import ContentTooShortError

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from monai.apps.utils import HashCheckError
from monai.bundle import ConfigParser, ConfigWorkflow, download_large_files

from scripts.clear_errors import command
from scripts.release import make
from scripts.release.configs import read_overlays, standalone_configs
from scripts.release.make import release
from scripts.release.metadata import describe, next_version, release_metadata, scores
from tests.conftest import BUNDLE_ROOT, TINY

CONFIGS = BUNDLE_ROOT / "configs"
TASKS = sorted(CONFIGS.glob("tasks/*.yaml"))
OPTIONS = sorted(CONFIGS.glob("options/*.yaml"))


def load(*names: str | Path) -> dict:
    return ConfigParser.load_config_files([str(CONFIGS / name) for name in names])


# --- configs that stand alone -----------------------------------------------------------------------------------------


def _anchors(page):
    """Of the headings of a Markdown page, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("task", TASKS, ids=lambda file: file.stem)
def test_merged_configs_are_those_of_a_run(task):
    """With the task alone, and with all options that training, evaluation and inference all take."""
    everywhere = [CONFIGS / "options" / f"{name}.yaml" for name in ("deep_supervision", "test_time_flipping", "ema")]
    for overlays in ([task], [task, *everywhere]):
        pairs, _ = read_overlays([str(file) for file in overlays])
        made = standalone_configs(CONFIGS, pairs)
        evaluation = ConfigParser(json.loads(json.dumps(made["train.json"])))
        evaluation.update(made["evaluate.json"])
        base = {"train": load("train.json"), "inference": load("inference.json")}
        for config, run, names in (
            (made["train.json"], load("train.json", *overlays), base["train"]),
            (evaluation.get(), load("train.json", "evaluate.json", *overlays), base["train"]),
        ):
            left = run.keys() - config.keys()
            assert left <= {"label_map", "label_names", "_meta_"} and not left & names.keys()
            assert config == {key: value for key, value in run.items() if key not in left}
        inference = ConfigParser(base["inference"])
        for key, value in pairs:
            if key.partition("#")[0] in base["inference"]:
                inference[key] = value
        assert made["inference.json"] == inference.get()


def test_evaluation_takes_what_an_overlay_sets_behind_it(tmp_path):
    overlay = {
        "checkpoint": "other.pt",
        "validate#additional_metrics#val_hd95#metric_fn#percentile": 90,
        "+validate#handlers": [{"_target_": "Mine"}],
    }
    file = tmp_path / "overlay.yaml"
    file.write_text(yaml.safe_dump(overlay))
    made = standalone_configs(CONFIGS, read_overlays([str(file)])[0])
    for name, config in made.items():
        (tmp_path / name).write_text(json.dumps(config))
    run = load("train.json", "evaluate.json", file)
    assert load(tmp_path / "train.json", tmp_path / "evaluate.json") == run
    assert run["validate"]["handlers"][-1] == {"_target_": "Mine"} and "checkpoint" not in made["train.json"]
    assert made["inference.json"]["checkpoint"] == "other.pt"
    pairs = [("inferer#inferer#inferer#overlap", 0.1), ("output_dir", "$@bundle_root+'/eval' + \"/mine\"")]
    made = standalone_configs(CONFIGS, pairs)  # what evaluation has as a reference alone; a path that is joined
    assert made["inference.json"]["inferer"]["inferer"]["inferer"]["overlap"] == 0.1
    assert made["evaluate.json"] == ConfigParser.load_config_file(CONFIGS / "evaluate.json")


@pytest.mark.parametrize("option", OPTIONS, ids=lambda file: file.stem)
def test_inference_takes_no_keys_that_it_does_not_use(option):
    made = standalone_configs(CONFIGS, read_overlays([str(option)])[0])
    new = made["inference.json"].keys() - load("inference.json").keys()
    assert new == {"ensemble": {"ensemble", "num_networks"}, "probabilities": {"probability", "save_probability"}}.get(
        option.stem, set()
    )


# --- metadata ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS, ids=lambda file: file.stem)
def test_metadata_of_every_task(task):
    pairs, own = read_overlays([str(task)], {"channels": [8, 16], "depths": [1, 1]})
    config = standalone_configs(CONFIGS, pairs)["inference.json"]
    described, network = describe(config)
    meta = release_metadata(json.loads((CONFIGS / "metadata.json").read_text()), described, own, task.stem, {})
    image, pred = (meta["network_data_format"][kind][name] for kind, name in (("inputs", "image"), ("outputs", "pred")))
    assert image["spatial_shape"] == pred["spatial_shape"] == config["patch_size"]
    assert (image["num_channels"], pred["num_channels"]) == (network.in_channels, network.head.out_channels)
    assert list(image["channel_def"]) == [str(k) for k in range(image["num_channels"])]
    assert list(pred["channel_def"]) == [str(k) for k in range(pred["num_channels"])]
    assert meta["data_source"] != "not stated" and (task.stem == "phantom" or image["modality"] in ("CT", "MR"))
    assert meta["data_license"] == own.get("data_license", "not stated")
    assert "Limits" not in meta["intended_use"]  # which are those of the hippocampus weights
    papers = [text for text in meta["references"] if "Mamba" not in text]  # of the data
    assert len(papers) == (task.stem != "phantom") and all(
        ("Decathlon" in text) == ("Decathlon" in meta["data_source"]) for text in papers
    )
    if task.stem == "brats21":  # regions out, label values as the data set has them
        assert list(pred["channel_def"].values()) == ["tumour core", "whole tumour", "enhancing tumour"]
        assert meta["label_classes"].endswith("0 background, 1 necrotic core, 2 oedema, 4 enhancing tumour")


def test_versions():
    meta = {"version": "1.2.0", "changelog": {"1.2.0": "b", "1.1.0": "a"}}
    assert next_version(meta, None, None) == meta
    assert next_version(meta, "1.10.0", "c") == {"version": "1.10.0", "changelog": {"1.10.0": "c", **meta["changelog"]}}
    for version, changelog, message in (
        ("1.2", None, "no semantic version"),
        ("v1.3.0", "c", "no semantic version"),
        ("1.1.0", None, "older than 1.2.0"),
        ("1.1.9", "c", "older than 1.2.0"),
        ("1.3.0", None, "give --changelog"),
        ("1.2.0", "c", "leave --changelog out"),
    ):
        with pytest.raises(ValueError, match=message):
            next_version(meta, version, changelog)


def test_scores_must_be_of_these_classes():
    described, _ = describe(load("inference.json"))
    values = {name: {"mean": k / 3, "std": 0.1} for k, name in enumerate(("Anterior", "Posterior", "mean"))}
    distances = {name: {"mean": 2, "std": 0} for name in values}
    assert scores({"cases": 3, "val_mean_dice": values, "val_hd95": distances}, described) == {
        "mean_dice_anterior": 0.0,
        "mean_dice_posterior": 0.3333,
        "mean_dice": 0.6667,
        "mean_hd95_mm": 2,
        "mean_hd95_mm_anterior": 2,
        "mean_hd95_mm_posterior": 2,
        "cases": 3,
    }
    for summary, message in (
        ({"cases": 3, "val_mean_dice": {"liver": {"mean": 1}}}, "other classes than the release: liver"),
        ({"cases": 3, "val_mean_dice": {"mean": {"mean": float("nan")}}}, "no mean of val_mean_dice"),
        ({"cases": 3, "val_mean_dice": {"mean": {"mean": 0.5}}}, "no std of val_mean_dice"),
        ({"cases": 3, "val_mean_dice": values, "val_hd95": {"mean": distances["mean"]}}, "no val_hd95 for Anterior"),
        ({"cases": 3}, "no summary.json"),
        ({"version": "1"}, "no summary.json"),
    ):
        with pytest.raises(ValueError, match=message):
            scores(summary, described)


# --- the zip ----------------------------------------------------------------------------------------------------------


def test_same_input_makes_the_same_bytes(released, tmp_path, monkeypatch):
    monkeypatch.chdir(BUNDLE_ROOT)
    release(**{**released.arguments, "output_dir": str(tmp_path)})
    (file,) = tmp_path.glob("*.zip")
    assert file.name == "segresmamba_v9.8.7.zip"
    assert file.read_bytes() == (released.served / file.name).read_bytes()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert (tmp_path / f"{file.name}.sha256").read_text() == f"{digest}  {file.name}\n" and digest in released.said
    checksum = hashlib.sha1(file.read_bytes()).hexdigest()  # the zoo's
    entry = {"checksum": checksum, "source": released.arguments["url"]}
    assert json.loads((tmp_path / "model_info.json").read_text()) == {"segresmamba_v9.8.7": entry}
    assert not list(tmp_path.glob("*.part"))
    with zipfile.ZipFile(file) as archive:
        assert {info.external_attr >> 16 for info in archive.infolist()} == {0o100644}
        assert archive.namelist() == sorted(archive.namelist())


def test_another_release_is_not_overwritten(released, tmp_path, monkeypatch):
    monkeypatch.chdir(BUNDLE_ROOT)
    given = {**released.arguments, "output_dir": str(tmp_path)}
    release(**given)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="holds another release"):
        release(**{**given, "changelog": "another"})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    release(**{**given, "name": "other"})
    assert set(json.loads((tmp_path / "model_info.json").read_text())) == {"segresmamba_v9.8.7", "other_v9.8.7"}


def test_what_it_holds(released, trained):
    held = {path.relative_to(released.root).as_posix() for path in released.root.rglob("*") if path.is_file()}
    assert {
        "LICENSE",
        "README.md",
        "docs/README.md",
        "docs/data_license.txt",
        "large_files.yml",
        "sbom.cdx.json",
    } < held
    assert {"configs/train.json", "configs/evaluate.json", "configs/multi_gpu_train.json", "models/model.pt"} < held
    assert {f"configs/options/{option.name}" for option in OPTIONS} < held
    assert not [name for name in held if name.startswith(("tests/", "configs/tasks/", "docs/evidence", "data/", "."))]
    meta = json.loads((released.root / "configs" / "metadata.json").read_text())
    assert meta["version"] == "9.8.7" and meta["changelog"]["9.8.7"] == "a test"
    summary = json.loads((trained.folder / "evaluate" / "summary.json").read_text())
    assert meta["eval_metrics"]["mean_dice"] == round(summary["val_mean_dice"]["mean"]["mean"], 4)
    assert meta["network_data_format"]["inputs"]["image"]["spatial_shape"] == TINY["patch_size"]

    card, hub = ((released.root / file).read_text() for file in ("docs/README.md", "README.md"))
    _, front, body = hub.split("---\n", 2)
    assert body.lstrip() == card
    front = yaml.safe_load(front)
    assert (front["license"], front["library_name"], front["pipeline_tag"]) == (
        "apache-2.0",
        "monai",
        "image-segmentation",
    )
    assert {"monai", "medical"} <= set(front["tags"])
    assert f"{summary['val_mean_dice']['mean']['mean']:.3f} ± " in card and released.arguments["url"] in card
    for page in released.root.rglob("*.md"):
        for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", page.read_text()):
            linked = page.parent / link if link else page
            assert linked.exists(), f"{page}: {link}"
            assert not anchor or anchor[1:] in _anchors(linked), f"{page}: {link}{anchor}"

    sbom = json.loads((released.root / "sbom.cdx.json").read_text())
    assert (sbom["bomFormat"], sbom["specVersion"]) == ("CycloneDX", "1.5")
    listed = {part["name"]: part for part in sbom["components"]}
    assert set(meta["required_packages_version"]) | {"torch", "monai", "numpy", "models/model.pt"} == set(listed)
    assert listed["torch"]["purl"] == f"pkg:pypi/torch@{meta['pytorch_version']}"
    assert all("version" in part for part in sbom["components"] if part["type"] == "library")
    digest = hashlib.sha256((trained.models / "model.pt").read_bytes()).hexdigest()
    assert listed["models/model.pt"]["hashes"] == [{"alg": "SHA-256", "content": digest}]


def test_small_weights_come_along(released, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(BUNDLE_ROOT)
    overlays = [released.arguments["task"], "configs/options/test_time_flipping.yaml"]
    given = {"task": overlays, "weights_url": None, "name": "other_name", "changelog": ("one", "two")}
    release(**{**released.arguments, **given, "output_dir": str(tmp_path)})
    with zipfile.ZipFile(tmp_path / "other_name_v9.8.7.zip") as archive:
        for name in ("train", "inference"):
            assert json.loads(archive.read(f"other_name/configs/{name}.json"))["flip_axes"] == "@mirror_axes"
        assert json.loads(archive.read("other_name/configs/metadata.json"))["changelog"]["9.8.7"] == "one, two"
        assert archive.read("other_name/models/model.pt") == (trained.models / "model.pt").read_bytes()
        assert yaml.safe_load(archive.read("other_name/large_files.yml")) == {"large_files": []}
    monkeypatch.setattr(make, "LIMIT", 1000)
    with pytest.raises(ValueError, match="up to 25: give --weights_url"):
        release(**{**released.arguments, "weights_url": None, "output_dir": str(tmp_path / "none")})
    assert not (tmp_path / "none").exists()


def test_scores_and_card_go_with_the_weights_they_are_of(tmp_path):
    """A release of the plain configs: with the weights of the repository, with others, and with none."""
    weights = BUNDLE_ROOT / "models" / "model.pt"
    dice = json.loads((CONFIGS / "metadata.json").read_text())["eval_metrics"]["mean_dice_anterior"]
    other = tmp_path / "other.pt"
    torch.save({name: value * 2 for name, value in torch.load(weights, weights_only=True).items()}, other)
    for checkpoint, scored in ((weights, True), (other, False), (None, False)):
        folder = tmp_path / str(checkpoint is None) / str(scored)
        release(checkpoint=None if checkpoint is None else str(checkpoint), output_dir=str(folder))
        (file,) = folder.glob("*.zip")
        with zipfile.ZipFile(file) as archive:
            meta = json.loads(archive.read("segresmamba/configs/metadata.json"))
            card, hub = (archive.read(f"segresmamba/{page}").decode() for page in ("docs/README.md", "README.md"))
            names = set(archive.namelist())
            assert ("segresmamba/models/model.pt" in names) == (checkpoint is not None)
        assert bool(meta["eval_metrics"]) == scored == (f"| anterior | {dice:.3f} ±" in card)
        for page, above in ((card, "segresmamba/docs"), (hub, "segresmamba")):
            links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page)
            assert all(os.path.normpath(f"{above}/{link}") in names for link in links), links
            files = re.findall(r"configs/\w+(?:/\w+)?\.(?:json|yaml)", page)
            assert files and all(f"segresmamba/{file}" in names for file in files)
            assert not scored or any(link.endswith(".png") for link in links)


@pytest.mark.parametrize("trained", [False, True])
def test_a_task_is_not_told_of_the_hippocampus(trained, tmp_path, phantom_dir):
    """Whose weights the repository brings."""
    task = "configs/tasks/btcv.yaml"
    settings = {"channels": [8, 16], "depths": [0, 0], "full_resolution_skip": 0}
    weights = tmp_path / "model.pt"
    if trained:
        pairs, _ = read_overlays([str(BUNDLE_ROOT / task)], settings)
        _, network = describe(standalone_configs(CONFIGS, pairs)["inference.json"])
        torch.save(network.state_dict(), weights)
    release(
        task=str(BUNDLE_ROOT / task),
        overrides=settings,
        checkpoint=str(weights) if trained else None,
        output_dir=str(tmp_path / "dist"),
    )
    (file,) = (tmp_path / "dist").glob("*.zip")
    with zipfile.ZipFile(file) as archive:
        meta, licence = (
            archive.read(f"segresmamba/{name}").decode() for name in ("configs/metadata.json", "docs/data_license.txt")
        )
    assert "hippocampus" not in meta.lower() + licence.lower() and "Decathlon" not in meta
    assert "BTCV" in licence and ("It brings no weights" in licence) != trained


def test_a_misspelt_option_writes_nothing(tmp_path, monkeypatch):
    arguments = ["release", "--chekpoint", "model.pt", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back afterwards
    with pytest.raises(ValueError, match="--chekpoint: did you mean --checkpoint?"):
        command(release)
    assert not (tmp_path / "out").exists()


def test_a_plan_can_be_released(tmp_path):
    """A plan names the data's place on its computer; the release a place in the bundle."""
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("dataset_dir: /somewhere/MyTask\nclass_names: [background, a, b]\nin_channels: 1\n")
    pairs, _ = read_overlays([str(overlay)])
    made = standalone_configs(BUNDLE_ROOT / "configs", pairs)
    assert (
        made["train.json"]["dataset_dir"] == "$@bundle_root + '/data/MyTask'" == made["inference.json"]["dataset_dir"]
    )


def test_only_files_of_the_bundle(tmp_path, monkeypatch):
    for name in ("LICENSE", "scripts/a.py", "scripts/stray.py", "configs/patients.csv", "configs/tasks/t.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(make, "_ROOT", tmp_path)
    assert set(make._tracked_files()) == {"LICENSE", "scripts/a.py", "scripts/stray.py"}
    if shutil.which("git") is None:
        pytest.skip("no git")
    for arguments in (["init", "-q"], ["add", "LICENSE", "scripts/a.py", "configs"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    assert set(make._tracked_files()) == {"LICENSE", "scripts/a.py"}
    (tmp_path / ".git" / "HEAD").unlink()
    with pytest.raises(OSError, match="git cannot say"):
        make._tracked_files()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "configs/tasks/nowhere.yaml"}, "no overlay configs/tasks/nowhere.yaml"),
        ({"version": "2"}, "no semantic version"),
        ({"version": "0.1.0", "changelog": None}, "older than"),
        ({"name": "seg-res"}, "only letters, digits and _"),
        ({"name": "seg_v2"}, "no _v before a digit"),
        ({"overrides": {"chanels": [8, 16]}}, "the key chanels .did you mean channels?"),
        ({"overrides": {"train#trainr#max_epochs": 3}}, "train#trainr#max_epochs .did you mean train#trainer"),
        ({"overrides": {"network_def#netwrok#channels": 3}}, "the key network_def#netwrok#channels"),
        ({"overrides": {"validate#additional_metrics#val_hd96#x": 3}}, "val_hd96#x"),
        ({"overrides": {"output_dir": ".."}}, "train.json would hold .., a path"),
        ({"overrides": {"output_dir": "/home/me/data"}}, "train.json would hold /home/me/data, a path"),
        ({"overrides": {"output_dir": "../data"}}, "train.json would hold ../data, a path"),
        ({"overrides": {"output_dir": "C:/data"}}, "train.json would hold C:/data, a path"),
        ({"overrides": {}}, "weights of another network"),
        ({"overrides": {"class_names": ["background", "liver"]}, "checkpoint": None}, "of other classes"),
        ({"task": (), "evaluation": None, "overrides": {"out_channels": 7}}, "7 output channels"),
        ({"task": (), "evaluation": None, "overrides": {"class_names": ["no", "yes"]}}, "give --task"),
        ({"checkpoint": "nowhere.pt"}, "no weights at nowhere.pt"),
        ({"checkpoint": None}, "--weights_url needs --checkpoint"),
        ({"checkpoint": None, "weights_url": None}, "--evaluation needs --checkpoint"),
        ({"checkpoint": "last.pt"}, "give the training's model.pt"),
        ({"weights_url": "disk/model.pt"}, "--weights_url disk/model.pt is no address to download from"),
        ({"url": "disk"}, "--url disk is no address to download from"),
        ({"evaluation": "nowhere.json"}, "no file nowhere.json"),
        ({"evaluation": "LICENSE"}, "not valid JSON"),
        ({"evaluation": "configs/metadata.json"}, "no summary.json"),
    ],
)
def test_bad_input(given, message, released, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(BUNDLE_ROOT)
    if given.get("checkpoint") == "last.pt":
        given = {"checkpoint": str(trained.models / "last.pt")}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        release(**{**released.arguments, "output_dir": str(tmp_path), **given})
    assert not list(tmp_path.iterdir())


# --- fetched from a server --------------------------------------------------------------------------------------------


def test_the_fetched_copy_infers_alike(released, trained, tmp_path):
    """In a process of its own, on images with no dataset.json beside them."""
    shutil.copytree(trained.data / "imagesTs", tmp_path / "images")
    places = ["--input", str(tmp_path / "images"), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    released.python("-m", "monai.bundle", "run", "--config_file", "configs/inference.json", *places, cwd=released.root)
    expected = sorted((trained.folder / "inference").glob("*_seg.nii.gz"))
    assert len(expected) == 2
    seen = set()
    for file in expected:
        one, other = nib.load(file), nib.load(tmp_path / "out" / file.name)
        assert np.array_equal(np.asarray(one.dataobj), np.asarray(other.dataobj))
        assert np.array_equal(one.affine, other.affine) and one.get_data_dtype() == other.get_data_dtype()
        seen |= set(np.unique(one.dataobj))
    assert len(seen) > 1  # or there is nothing that could differ
    cases = json.loads((tmp_path / "out" / "cases.json").read_text())
    assert {"liver-like", "vessel-like"} < set(next(iter(cases.values()))["volumes_ml"])


def test_the_fetched_copy_loads(released):
    code = (
        "import torch; from monai.bundle import load\n"
        "weights = torch.load('models/model.pt', weights_only=True)\n"
        "for kind in ('train', 'inference'):\n"
        "    network = load('segresmamba', bundle_dir='..', workflow_type=kind, device='cpu')\n"
        "    state = network.state_dict()\n"
        "    same = state.keys() == weights.keys() and all(torch.equal(state[k], weights[k]) for k in weights)\n"
        "    print('loaded', kind, type(network).__name__, type(network).__module__, same)\n"
    )
    said = released.python("-c", code, cwd=released.root)
    for kind in ("train", "inference"):
        assert f"loaded {kind} SegResMamba scripts.segresmamba True" in said


@pytest.mark.parametrize(
    ("configs", "kind"), [(["train"], "train"), (["train", "evaluate"], "evaluation"), (["inference"], "inference")]
)
def test_check_properties(configs, kind, released, phantom_dir, tmp_path):
    flow = ConfigWorkflow(
        [str(released.root / "configs" / f"{name}.json") for name in configs],
        meta_file=str(released.root / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type=kind,
        bundle_root=str(released.root),
        dataset_dir=str(phantom_dir),
        output_dir=str(tmp_path),
        check_data=False,
        device="cpu",
    )
    flow.initialize()
    assert not flow.check_properties()


@pytest.fixture
def unfetched(released, tmp_path) -> Path:
    """A copy without its weights."""
    return Path(shutil.copytree(released.root, tmp_path / "bundle", ignore=shutil.ignore_patterns("models")))


def test_weights_with_the_right_sum(released, trained):
    assert (released.root / "models" / "model.pt").read_bytes() == (trained.models / "model.pt").read_bytes()


@pytest.mark.parametrize("fault", ["hash", "cut"])
def test_other_weights_are_refused(fault, released, unfetched):
    file = unfetched / "large_files.yml"
    content = yaml.safe_load(file.read_text())
    (entry,) = content["large_files"]
    assert entry["hash_type"] == "sha256"
    if fault == "hash":
        entry["hash_val"] = "0" * 64
    else:
        entry["url"] = f"{released.url}/cut/model.pt"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(HashCheckError if fault == "hash" else ContentTooShortError):
        download_large_files(str(unfetched))
    assert not list(unfetched.rglob("*.pt*"))  # nothing half-written


@pytest.mark.parametrize("fault", ["missing", "half"])
def test_inference_refuses_weights_that_are_not_those(fault, trained, unfetched):
    if fault == "half":
        whole = (trained.models / "model.pt").read_bytes()
        (unfetched / "models").mkdir()
        (unfetched / "models" / "model.pt").write_bytes(whole[: len(whole) // 2])
    parser = ConfigParser(ConfigParser.load_config_file(unfetched / "configs" / "inference.json"))
    parser.update({"bundle_root": str(unfetched), "device": "cpu"})
    with pytest.raises(Exception) as error:
        parser.get_parsed_content("weights_check")
    cause = str(error.value.__cause__)
    expected = {"missing": "There are no weights at .* download_large_files", "half": "its hash differs"}[fault]
    assert re.search(expected, cause)


def test_the_fetched_copy_plans(released, phantom_dir, tmp_path):
    """It has the figures by which its commands choose and compare."""
    written = tmp_path / "mine.yaml"
    arguments = ("--dataset_dir", str(phantom_dir), "--output", str(written), "--memory_gb", "4")
    released.python("-m", "scripts.plan", *arguments, cwd=released.root)
    assert "patch_size" in ConfigParser.load_config_file(written)
    code = "from scripts.benchmark.papers import load_papers; print(len(load_papers()), 'set-ups')"
    assert "set-ups" in released.python("-c", code, cwd=released.root)


def test_training_goes_on_in_the_fetched_copy(released, phantom_dir, tmp_path):
    """From its weights, by its configs alone."""
    parser = ConfigParser(ConfigParser.load_config_file(released.root / "configs" / "train.json"))
    parser.update({"bundle_root": str(released.root), "dataset_dir": str(phantom_dir), "device": "cpu"})
    parser["pretrained"] = str(released.root / "models" / "model.pt")
    parser.get_parsed_content("load_pretrained")
    given = torch.load(released.root / "models" / "model.pt", weights_only=True)
    assert all(
        torch.equal(value, given[key]) for key, value in parser.get_parsed_content("network").state_dict().items()
    )
