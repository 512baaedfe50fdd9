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
import re
import shutil
import statistics

import pytest
from monai.bundle import ConfigParser

from scripts.benchmark.page import page
from scripts.experiments import planned_runs
from scripts.report import report
from tests.conftest import BUNDLE_ROOT

EVIDENCE = BUNDLE_ROOT / "docs" / "evidence"
RESULTS = sorted(EVIDENCE.glob("*/*-fold*-seed*.json"))
REPORTS = {  # results, reference, arms
    "screening_report": (["screening"], "base", ()),
    "confirmation_report": (["confirmation"], "segresmamba", ("segresmamba", "segresnet")),
    "dynunet_report": (["confirmation"], "segresmamba", ("segresmamba", "segresnet", "dynunet")),
    "without_tom_report": (["confirmation"], "segresmamba", ("segresmamba", "without_tom")),
    "nnunet_report": (["confirmation", "nnunet"], "segresmamba", ("segresmamba", "nnunet")),
    "equal_time_report": (["confirmation"], "without_tom", ("without_tom", "segresmamba_equal_time")),
    "longer_report": (
        ["confirmation", "longer", "augmented"],
        "segresmamba",
        (
            *("segresmamba", "segresnet", "longer", "longer_flipping", "longer_larger_window"),
            *("augmented", "augmented_flipping"),
        ),
    ),
}


def test_the_page_shows_what_the_results_say(tmp_path):
    """The tables are made from the results of the runs, and stand in the page as they were made."""
    docs = tmp_path / "docs"
    shutil.copytree(EVIDENCE, docs / "evidence")
    shutil.copy(BUNDLE_ROOT / "docs" / "evidence.md", docs)
    text = (BUNDLE_ROOT / "docs" / "evidence.md").read_text()
    for name, (parts, reference, arms) in REPORTS.items():
        made = docs / "evidence" / name
        shutil.rmtree(made)
        sources = [str(docs / "evidence" / part) for part in parts]
        report(*sources, output_dir=str(made), reference=reference, arms=arms)
        for file in ("comparison.md", "comparison.csv", "runs.md"):
            assert (made / file).read_text() == (EVIDENCE / name / file).read_text(), (name, file)
        command = ["docs/evidence/" + part for part in parts] + ["--reference", reference]
        command += ["--arms", ",".join(arms)] if arms else []
        asked = " ".join([*command, "--output_dir", f"docs/evidence/{name}"])
        assert asked in " ".join(text.replace("\\\n", " ").split())
    page(str(docs / "evidence.md"))
    assert (docs / "evidence.md").read_text() == text


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_results_are_of_the_plan_that_is_shown(file):
    (run,) = (run for run in planned_runs(str(file.parent.with_suffix(".yaml"))) if run.name == file.stem)
    content = json.loads(file.read_text())
    assert {key: content[key] for key in run.settings} == run.settings
    assert len(content["cases"]) == content["summary"]["cases"] >= 41
    dice = [case["val_mean_dice"]["mean"] for case in content["cases"].values()]
    assert sum(dice) / len(dice) == pytest.approx(content["summary"]["val_mean_dice"]["mean"]["mean"], abs=1e-4)


def test_the_scores_of_the_bundle_are_those_of_the_cross_validation():
    runs = [json.loads(file.read_text()) for file in RESULTS if file.name.startswith("segresmamba-fold")]
    cases = [case for run in runs for case in run["cases"].values()]
    scores = json.loads((BUNDLE_ROOT / "configs" / "metadata.json").read_text())["eval_metrics"]
    assert scores.pop("cases") == len(cases)
    card = (BUNDLE_ROOT / "docs" / "README.md").read_text()
    for name in ("Anterior", "Posterior"):
        row = [name.lower()]
        for metric, digits in (("val_mean_dice", 3), ("val_hd95", 2), ("val_surface_dice", 3)):
            values = [case[metric][name] for case in cases]
            row.append(f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}")
        assert f"| {' | '.join(row)} |" in card
    names = {"mean_dice": "val_mean_dice", "mean_hd95_mm": "val_hd95", "mean_surface_dice": "val_surface_dice"}
    classes = {"": "mean", "_anterior": "Anterior", "_posterior": "Posterior"}
    assert scores == {
        score + end: round(statistics.mean(case[metric][label] for case in cases), 4)
        for score, metric in names.items()
        for end, label in classes.items()
    }


def test_the_scores_in_the_text_are_those_of_the_metadata():
    """In the card also SegResNet's, on the same cases."""
    scores = json.loads((BUNDLE_ROOT / "configs" / "metadata.json").read_text())["eval_metrics"]
    readme, card = (" ".join((BUNDLE_ROOT / page).read_text().split()) for page in ("README.md", "docs/README.md"))
    dice, hd95 = (
        [scores[f"{score}_{end}"] for end in ("anterior", "posterior")] for score in ("mean_dice", "mean_hd95_mm")
    )
    assert f"{scores['cases']} held-out cases: Dice {dice[0]:.3f} (anterior) and {dice[1]:.3f} (posterior)" in readme
    assert f"HD95 {hd95[0]:.2f} and {hd95[1]:.2f} mm" in readme and f"({scores['cases']} held-out cases" in card
    assert f"of both classes is {scores['mean_dice']:.3f} Dice and {scores['mean_hd95_mm']:.2f} mm" in card
    confirmed = (
        file for file in RESULTS if file.parent.name == "confirmation" and file.name.startswith("segresnet-fold")
    )
    cases = [case for file in confirmed for case in json.loads(file.read_text())["cases"].values()]
    assert len(cases) == scores["cases"]
    means = [statistics.mean(case[metric]["mean"] for case in cases) for metric in ("val_mean_dice", "val_hd95")]
    assert f"SegResNet, trained alike, reaches {means[0]:.3f} and {means[1]:.2f} mm" in card


def test_the_sizes_in_the_text(monkeypatch):
    """Parameters of the screening's networks, in millions."""
    monkeypatch.chdir(BUNDLE_ROOT)  # which the overlays of the plan are named from
    millions = {}
    for run in planned_runs(str(EVIDENCE / "screening.yaml")):
        if EVIDENCE / "screening" / f"{run.name}.json" in RESULTS and run.arm not in millions:
            parser = ConfigParser(
                ConfigParser.load_config_files([BUNDLE_ROOT / "configs" / "train.json", *run.configs])
            )
            parser.update({**run.overrides, "in_channels": 1, "out_channels": 3})
            network = parser.get_parsed_content("network_def")
            millions[run.arm] = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    whole = (BUNDLE_ROOT / "docs" / "evidence.md").read_text()
    table = whole.partition("million parameters |\n")[2].partition("\n\n")[0].splitlines()[1:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    sizes = {arm: size for arms, _, size in rows for arm in arms.split(", ")}
    assert sizes == {arm: f"{size:.2f}" for arm, size in millions.items()}
    text = " ".join(whole.split())
    assert f"of {min(millions.values()):.1f} to {max(millions.values()):.1f} million parameters" in text
    assert f"{millions['tables_variant']:.1f} million parameters) gains over the text's" in text
    assert f"UNet, of {millions['unet']:.1f} million parameters" in text
    assert f"SwinUNETR**, of {millions['swin_unetr']:.1f} million parameters" in text


def test_the_folds_that_nothing_was_chosen_on():
    text = " ".join((BUNDLE_ROOT / "docs" / "evidence.md").read_text().split())
    means = {}
    for arm in ("segresmamba", "segresnet"):
        runs = [json.loads((EVIDENCE / "confirmation" / f"{arm}-fold{k}-seed0.json").read_text()) for k in range(1, 5)]
        cases = [case for run in runs for case in run["cases"].values()]
        means[arm] = [
            statistics.mean(case[metric]["mean"] for case in cases) for metric in ("val_mean_dice", "val_hd95")
        ]
    (dice, hd95), (other_dice, other_hd95) = means.values()
    assert f"{len(cases)} cases, the mean Dice is {dice:.4f} for SegResMamba and {other_dice:.4f} for SegResNet" in text
    assert f"HD95 {hd95:.3f} and {other_hd95:.3f} mm" in text


def test_what_leads_the_screening():
    files = [file for file in RESULTS if file.parent.name == "screening" and file.stem.endswith("seed0")]
    dice = {
        file.stem.split("-fold")[0]: json.loads(file.read_text())["summary"]["val_mean_dice"]["mean"]["mean"]
        for file in files
    }
    first, second = sorted(dice, key=dice.__getitem__)[:-3:-1]
    assert (first, second) == ("dynunet", "wide_batch_1_learning_rate_3e-3_skip_of_32")
    text = " ".join((BUNDLE_ROOT / "docs" / "evidence.md").read_text().split())
    assert (
        f"DynUNet leads the screening**: {dice[first]:.4f}, against {dice[second]:.4f} of the best SegResMamba" in text
    )


def test_what_swin_unetr_reached():
    dice = {
        arm: [
            json.loads(file.read_text())["summary"]["val_mean_dice"]["mean"]["mean"]
            for file in (EVIDENCE / "screening").glob(f"{arm}-fold0-seed*.json")
        ]
        for arm in ("swin_unetr", "base", "segresnet", "dynunet")
    }
    (reached,), base = dice["swin_unetr"], dice["base"]
    ahead = reached - statistics.mean(base)
    text = " ".join((BUNDLE_ROOT / "docs" / "evidence.md").read_text().split())
    assert f"reaches {reached:.4f}: {ahead:.4f} more than the base arm, less than twice" in text
    assert ahead < 2 * statistics.stdev(base)
    others = [statistics.mean(dice[arm]) for arm in ("segresnet", "dynunet")]
    assert f"SegResNet reaches {others[0]:.4f} and DynUNet {others[1]:.4f} after as many steps" in text


def test_what_a_wider_path_at_full_resolution_gains():
    arms = ("wide_batch_1_learning_rate_3e-3_skip_of_32", "wide_batch_1_learning_rate_3e-3")
    summaries = [
        json.loads((EVIDENCE / "screening" / f"{arm}-fold0-seed0.json").read_text())["summary"] for arm in arms
    ]
    dice, hd95 = (
        [summary[metric]["mean"]["mean"] for summary in summaries] for metric in ("val_mean_dice", "val_hd95")
    )
    text = " ".join((BUNDLE_ROOT / "docs" / "evidence.md").read_text().split())
    assert f"reach a Dice of {dice[0]:.4f} in place of {dice[1]:.4f}, and an HD95 of {hd95[0]:.2f} in place" in text
    assert f"in place of {hd95[1]:.2f} mm, on one seed" in text


def test_what_is_left_of_the_lead_of_dynunet():
    results = {
        arm: json.loads((EVIDENCE / "confirmation" / f"{arm}-fold0-seed0.json").read_text())
        for arm in ("segresmamba", "dynunet")
    }
    dice, hd95 = (
        [result["summary"][metric]["mean"]["mean"] for result in results.values()]
        for metric in ("val_mean_dice", "val_hd95")
    )
    text = " ".join((BUNDLE_ROOT / "docs" / "evidence.md").read_text().split())
    assert f"its Dice is {dice[1] - dice[0]:.4f} higher than SegResMamba's" in text
    assert f"its HD95 {hd95[1] - hd95[0]:.3f} mm larger" in text and f"DynUNet, {dice[1]:.4f} after as many" in text
    curve = {row["epoch"]: row["val_mean_dice"] for row in results["dynunet"]["curve"]}
    assert f"rises from {float(curve['30']):.3f} to {float(curve['40']):.3f}" in text
    on_the_fold = [json.loads(file.read_text()) for file in RESULTS if "-fold0-" in file.name]
    best = max(result["summary"]["val_mean_dice"]["mean"]["mean"] for result in on_the_fold)
    assert best == dice[1] < 0.89  # no training here has reached more
    table = (EVIDENCE / "dynunet_report" / "comparison.md").read_text()
    found = re.findall(r"\| dynunet .* ([\d.]+) \|\n", table)
    assert len(found) == 4 and min(map(float, found)) > 0.05


def test_at_equal_time_no_difference_is_found():
    files = sorted((EVIDENCE / "confirmation").glob("segresmamba_equal_time-fold*.json"))
    assert [json.loads(file.read_text())["fold"] for file in files] == [0, 1, 2, 3, 4]  # as the page says
    table = (EVIDENCE / "equal_time_report" / "comparison.md").read_text()
    text = " ".join((BUNDLE_ROOT / "docs" / "evidence.md").read_text().split())
    behind = re.search(r"\| segresmamba_equal_time .* -(0\.\d{4}) \[", table)[1]
    assert f"its Dice is {behind} lower with ToM" in text
    found = re.findall(r"\| segresmamba_equal_time .* ([\d.]+) \|\n", table)
    assert len(found) == 4 and min(map(float, found)) > 0.05


def test_what_nnunet_reached():
    result = json.loads((EVIDENCE / "nnunet" / "nnunet-fold0.json").read_text())
    text = " ".join((BUNDLE_ROOT / "docs" / "evidence.md").read_text().split())
    steps = f"{result['num_epochs']} epochs of {result['iterations_per_epoch']} steps"
    assert f"patches of {' × '.join(map(str, result['patch_size']))} voxels, batches of {result['batch_size']}" in text
    assert f"a network of {result['parameters'] / 1e6:.1f} million parameters, and was given {steps}" in text
    reached = result["summary"]["val_mean_dice"]["mean"]["mean"]
    assert f"after {result['num_epochs'] * result['iterations_per_epoch']} it is behind, {reached:.4f}" in text
    others = json.loads((EVIDENCE / "confirmation" / "segresmamba-fold0-seed0.json").read_text())
    assert others["cases"].keys() == result["cases"].keys()


def test_the_end_of_the_learning_curves():
    rises = []
    for arm in ("segresmamba", "segresnet"):
        files = (EVIDENCE / "confirmation").glob(f"{arm}-fold*.json")
        curves = [
            {row["epoch"]: row["val_mean_dice"] for row in json.loads(file.read_text())["curve"]} for file in files
        ]
        rises.append(statistics.mean(float(curve["40"]) - float(curve["30"]) for curve in curves))
    text = " ".join((BUNDLE_ROOT / "docs" / "evidence.md").read_text().split())
    assert f"still rises by {rises[0]:.3f} for SegResMamba and {rises[1]:.3f} for SegResNet" in text


def test_the_costs_in_the_text_are_those_measured():
    rows = json.loads((EVIDENCE / "efficiency-hippocampus.json").read_text())["rows"]
    text = (BUNDLE_ROOT / "docs" / "evidence.md").read_text()
    for name, label in (
        ("Hippocampus", "base"),
        ("Hippocampus, wide", "wide"),
        ("Hippocampus, without the full-resolution skip", "without the full-resolution skip"),
        ("Hippocampus, stem of stride 1", "stem of stride 1"),
    ):
        seconds = {row["network"]: row["training"]["median"] for row in rows if row["setup"] == name}
        others = [seconds[n] / seconds["segresmamba_text"] for n in ("segresmamba_without_tom", "segresnet")]
        assert f"| {label} | {others[0]:.2f} | {others[1]:.2f} |" in text
        assert label != "wide" or f"{1 / others[0]:.2f} times as long in bf16" in text


def test_what_the_text_says_of_the_later_runs():
    text = " ".join((BUNDLE_ROOT / "docs" / "evidence.md").read_text().split())
    with_tom, without = (
        [json.loads((EVIDENCE / "confirmation" / f"{arm}-fold{k}-seed0.json").read_text())["cases"] for k in range(5)]
        for arm in ("segresmamba", "without_tom")
    )
    means = [
        statistics.mean(case["val_mean_dice"]["mean"] for cases in runs[1:] for case in cases.values())
        for runs in (with_tom, without)
    ]
    assert f"the mean Dice is {means[0]:.4f} with ToM and {means[1]:.4f} without" in text
    every = [
        statistics.mean(case["val_mean_dice"]["mean"] for cases in runs for case in cases.values())
        for runs in (with_tom, without)
    ]
    readme = " ".join((BUNDLE_ROOT / "README.md").read_text().split())
    assert f"(mean Dice {every[0]:.4f} with them, {every[1]:.4f} without" in readme
    gains = [
        statistics.mean(case["val_mean_dice"]["mean"] for case in cases[1].values())
        - statistics.mean(case["val_mean_dice"]["mean"] for case in cases[0].values())
        for cases in zip(with_tom, without)
    ]
    assert f"between {-min(gains):.4f} worse and {max(gains):.4f} better" in text
    table = (EVIDENCE / "without_tom_report" / "comparison.md").read_text()
    assert all(float(p) > 0.05 for p in re.findall(r"\| without_tom .* ([\d.]+) \|\n", table))
    runs = {file.stem: json.loads(file.read_text()) for file in RESULTS if file.parent.name in ("longer", "augmented")}
    curve = {int(row["epoch"]): row for row in runs["longer-fold0-seed0"]["curve"]}
    losses = [float(curve[epoch]["train_mean_loss"]) for epoch in (60, 120)]
    assert (
        f"level from epoch 60 on, while the loss of the training falls from {losses[0]:.3f} to {losses[1]:.3f}" in text
    )
    assert max(float(curve[epoch]["val_mean_dice"]) for epoch in (80, 100, 120)) <= float(curve[60]["val_mean_dice"])
    dice = {name.split("-")[0]: run["summary"]["val_mean_dice"]["mean"]["mean"] for name, run in runs.items()}
    for arm in ("longer", "augmented"):
        assert f"Test-time flipping adds about {dice[f'{arm}_flipping'] - dice[arm]:.3f}" in text
    shorter = [
        json.loads((EVIDENCE / "confirmation" / f"{arm}-fold0-seed0.json").read_text())["summary"]["val_mean_dice"]
        for arm in ("segresmamba", "segresnet")
    ]
    dice |= {"segresnet": shorter[1]["mean"]["mean"]}
    assert max(dice.values()) < shorter[0]["mean"]["mean"]  # None is better
    assert f"and SegResNet's, lie between {min(dice.values()):.3f} and {max(dice.values()):.3f} here" in text
