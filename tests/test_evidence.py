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

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigParser
from scipy.stats import ttest_ind

from scripts.benchmark.page import page
from scripts.experiments import planned_runs
from scripts.report import report
from tests.conftest import BUNDLE_ROOT
from tests.test_datalist import HIPPOCAMPUS, needs_hippocampus

EVIDENCE = BUNDLE_ROOT / "docs" / "evidence"
RESULTS = sorted(EVIDENCE.glob("*/*-fold*-seed*.json"))
_WITHOUT_SKIP = ("without_skip_without_tom", "without_skip", "without_skip_without_tom_equal_time")
REPORTS = {  # results, reference, arms
    "screening_report": (["screening"], "base", ()),
    "monai_networks_report": (
        ["screening"],
        "wide_batch_1_learning_rate_3e-3_skip_of_32",
        (
            *("wide_batch_1_learning_rate_3e-3_skip_of_32", "wide_batch_1_learning_rate_3e-3"),
            *("dynunet", "segresnet", "swin_unetr", "unet"),
        ),
    ),
    "without_skip_report": (["screening"], _WITHOUT_SKIP[0], _WITHOUT_SKIP),
    "confirmation_report": (
        ["confirmation"],
        "segresmamba",
        ("segresmamba", "segresmamba_equal_time", "without_tom", "segresnet", "dynunet"),
    ),
    "nnunet_report": (["nnunet"], "", ()),
    "tom_report": (["confirmation"], "without_tom", ("without_tom", "segresmamba_equal_time")),
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
    assert {folder.name for folder in EVIDENCE.glob("*_report")} == set(REPORTS)
    for name, (parts, reference, arms) in REPORTS.items():
        made = docs / "evidence" / name
        shutil.rmtree(made)
        sources = [str(docs / "evidence" / part) for part in parts]
        report(*sources, output_dir=str(made), reference=reference, arms=arms)
        assert {file.name for file in made.iterdir()} == {file.name for file in (EVIDENCE / name).iterdir()}
        for file in (*made.glob("*.md"), *made.glob("*.csv")):
            assert file.read_text() == (EVIDENCE / name / file.name).read_text(), file
        command = ["docs/evidence/" + part for part in parts] + (["--reference", reference] if reference else [])
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
    assert f"SegResNet, with the better of two learning rates, reaches {means[0]:.3f} and {means[1]:.2f} mm" in card


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
    assert f"of {min(millions.values()):.1f} to {max(millions.values()):.1f} million" in " ".join(whole.split())


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


def read(part, arm, fold=0, seed=0):
    return json.loads((EVIDENCE / part / f"{arm}-fold{fold}-seed{seed}.json").read_text())


def reached(result, metric="val_mean_dice"):
    return result["summary"][metric]["mean"]["mean"]


def page_text():
    return " ".join((BUNDLE_ROOT / "docs" / "evidence.md").read_text().split())


def in_words(difference):
    return f"{difference[1:]} {'higher' if difference[0] == '+' else 'lower'}"


def millimetres(interval):
    """An interval of a report in mm, to three decimals."""
    mean, low, high = map(float, re.findall(r"[\d.]+", interval))
    return f"{mean:.3f} mm [{low:.3f}, {high:.3f}]"


def row(name, arm, file="comparison.md", table=0):
    """The cells behind an arm's name in a table of a report."""
    rows = re.findall(rf"^\| {arm} \|(.*)\|$", (EVIDENCE / name / file).read_text(), re.MULTILINE)
    return [cell.strip() for cell in rows[table].split("|")]


def test_the_two_sides_of_a_person():
    """What the page says of them: where the two lie, and that it shows in no score."""
    fold, dice = {}, {}
    for k in range(5):
        for case, values in read("confirmation", "segresmamba", k)["cases"].items():
            number = int(re.search(r"\d+", case)[0])
            fold[number], dice[number] = k, values["val_mean_dice"]["mean"]
    other = {number: number + 1 if number % 2 else number - 1 for number in fold}
    apart = [number for number in fold if fold.get(other[number], fold[number]) != fold[number]]
    means = [statistics.mean(dice[number] for number in numbers) for numbers in (apart, fold.keys() - set(apart))]
    text = page_text()
    assert f"for {len(apart)} of the {len(fold)} cases the other side is among the training cases" in text
    assert f"{means[0]:.4f} for these and {means[1]:.4f} for the others" in text
    values = [[dice[number] for number in numbers] for numbers in (apart, fold.keys() - set(apart))]
    low, high = ttest_ind(*values, equal_var=False).confidence_interval()
    assert f"95 % interval is {low:+.3f} to {high:+.3f}" in text
    pairs = [(number, number + 1) for number in fold if number % 2 and number + 1 in fold]
    together = np.corrcoef([dice[first] for first, _ in pairs], [dice[second] for _, second in pairs])[0, 1]
    narrow = (1 + 2 * len(pairs) / len(fold) * together) ** 0.5
    assert f"correlates by {together:.2f} in the {len(pairs)} pairs" in text and f"are {narrow:.2f} times too" in text
    alike = []
    for arm in ("segresnet", "dynunet", "without_tom", "segresmamba_equal_time"):
        cases = {name: values for k in range(5) for name, values in read("confirmation", arm, k)["cases"].items()}
        found = {int(re.search(r"\d+", name)[0]): values["val_mean_dice"]["mean"] for name, values in cases.items()}
        more = [[found[number] - dice[number] for number in pair] for pair in pairs]
        alike.append(np.corrcoef(np.transpose(more))[0, 1])
    assert f"networks correlate by {min(alike):.2f} to {max(alike):+.2f} only" in text


@needs_hippocampus
def test_images_of_one_person_have_the_same_step_of_intensity():
    step = {}
    for file in sorted((HIPPOCAMPUS / "imagesTr").glob("hippocampus_*.nii.gz")):
        values = np.unique(np.asanyarray(nib.load(file).dataobj))
        if values.dtype.kind == "f":  # others are scaled to 8 bits, whose step is 1
            step[int(file.name[12:15])] = values[-1] / np.round(values[-1] / np.diff(values).min())
    neighbours = {
        first: [np.isclose(step[k], step[k + 1], rtol=1e-4) for k in step if k % 2 == first and k + 1 in step]
        for first in (1, 0)
    }
    assert all(neighbours[1]) and not any(neighbours[0])
    pairs, others = map(len, neighbours.values())
    assert f"in all {pairs} such pairs that keep it the step is the same, in none of the {others} other" in page_text()


def test_what_is_said_of_the_screening():
    files = [file for file in RESULTS if file.parent.name == "screening" and file.stem.endswith("seed0")]
    dice = {file.stem.split("-fold")[0]: reached(json.loads(file.read_text())) for file in files}
    first, second = sorted(dice, key=dice.__getitem__)[:-3:-1]
    assert (first, second) == ("dynunet", "wide_batch_1_learning_rate_3e-3_skip_of_32")
    others = ("segresnet", "swin_unetr", "unet", "dynunet")
    as_many = [value for arm, value in dice.items() if "batch_1" not in arm and not arm.startswith(others)]
    lead = dice["dynunet"] - max(as_many)
    assert f"by at least {lead:.3f} of every SegResMamba of as many" in page_text() and lead >= 0.005
    curves = {}
    for arm in ("segresmamba", "dynunet"):
        runs = [{line["epoch"]: line for line in read("confirmation", arm, k)["curve"]} for k in range(5)]
        curves[arm] = [statistics.mean(float(run[e]["val_mean_dice"]) for run in runs) for e in ("10", "20", "30")]
    assert "it is ahead at epochs 10, 20 and 30" in page_text()
    assert all(more > less for more, less in zip(curves["dynunet"], curves["segresmamba"]))
    path, stem = (dice[f"{arm}learning_rate_3e-3"] for arm in ("", "stem_stride_1_"))
    assert (
        f"The path at full resolution reaches {path:.4f}, a stem of stride 1 in its place {stem:.4f} at the same "
        "learning rate" in page_text()
    )
    found = {arm: row("screening_report", arm, "runs.md")[-1] for arm in dice if arm != "base"}
    difference = {arm: [float(part) for part in cell.split(" ± ")] for arm, cell in found.items()}
    del difference["without_skip_without_tom"]  # lacks two things
    assert min(difference, key=lambda arm: difference[arm][0]) == "without_skip"  # worth most
    assert -difference["without_skip"][0] > max(value for value, _ in difference.values())
    assert f"Dice is {-difference['without_skip'][0]:.3f} lower in the screening" in page_text()
    del difference["without_skip_without_tom_equal_time"]
    least, more = (
        max(abs(difference[arm][0]) for arm in arms)
        for arms in (
            ("residual", "eight_orders", "ema", "deep_supervision"),
            ("warm_up", "dice_loss", "skip_of_8"),
        )
    )
    hints = [difference[arm] for arm in ("batch_1", "learning_rate_3e-3", "wide", "tables_variant")]
    assert f"changed Dice by at most {least:.4f}, a warm-up, " in page_text()
    assert f"a path of 8 channels in place of 16 by at most {more:.4f}." in page_text()
    gains = [f"{gain:.3f}" for gain, _ in sorted(hints)]
    lost = f"strong augmentation lost {-difference['strong_augmentation'][0]:.3f}"
    assert f"gained {gains[0]} to {gains[-1]}, {lost}. Seeds alone can make all of these" in page_text()
    single = ("warm_up", "dice_loss", "skip_of_8", "strong_augmentation")
    assert all(abs(gain) < chance for gain, chance in [*hints, *(difference[arm] for arm in single)])
    lower, chance = difference["spacing_0.8"]
    assert f"Dice is {-lower:.3f} lower in one short training, outside what seeds alone make" in page_text()
    surface, hd95 = (
        [float(row("screening_report", arm, table=table)[2][:6]) for arm in ("base", "spacing_0.8")] for table in (2, 1)
    )
    assert -lower > chance and abs(surface[0] - surface[1]) < 0.001 and abs(hd95[0] - hd95[1]) < 0.01
    table = (EVIDENCE.parent / "evidence.md").read_text().partition("## Defaults, and why")[2].partition("\n## ")[0]
    assert f"; 8 lost {-difference['skip_of_8'][0]:.4f} and 32" in table
    best = [dice[f"wide_batch_1_learning_rate_3e-3{end}"] for end in ("", "_skip_of_32")]
    assert (
        f"that did best ({best[0]:.4f}, with single patches and 3e-3, and {best[1]:.4f}, with a path of 32 too); "
        f"alone {difference['wide'][0]:+.4f}," in table
    )
    assert min(best) > max(as_many)
    assert f"the better of two, alone {difference['learning_rate_3e-3'][0]:+.4f}," in table
    assert f"| {difference['tables_variant'][0]:+.4f} in one seed, no less than what the width gained" in table
    assert difference["tables_variant"][0] > difference["wide"][0]

    assert f"Dice loss alone gained {difference['dice_loss'][0]:.4f}, which seeds alone can make" in table


def test_dynunet():
    text = page_text()
    cells, by_fold = row("confirmation_report", "dynunet"), row("confirmation_report", "dynunet", "folds.md")
    over_cases, over_folds = (re.findall(r"[+-][\d.]+", part) for part in (cells[3], by_fold[-1]))
    assert (
        f"on five folds its Dice is {abs(float(over_cases[0])):.4f} "
        f"{'higher' if float(over_cases[0]) > 0 else 'lower'} (95 % over the cases {over_cases[1]} to {over_cases[2]}, "
        f"over the folds {over_folds[1]} to {over_folds[2]})" in text
    )
    p = [row("confirmation_report", "dynunet", table=table)[-1] for table in range(4)]
    assert min(map(float, p)) > 0.05 and "no test finds a difference" in text


def test_weights_in_half_precision():
    changes = []
    for k in range(5):
        whole, half = (read("confirmation", f"segresmamba_equal_time{end}", k)["cases"] for end in ("", "_half"))
        assert whole.keys() == half.keys()
        changes += [half[name]["val_mean_dice"]["mean"] - whole[name]["val_mean_dice"]["mean"] for name in half]
    assert len(changes) == 208 and abs(statistics.mean(changes)) < 0.0001
    card = " ".join((BUNDLE_ROOT / "docs" / "README.md").read_text().split())
    most = max(map(abs, changes))
    assert f"differs by less than 0.0001, and no case changes by more than {most:.4f}, no class" in page_text()
    by_class = 0.0
    for k in range(5):
        whole, half = (read("confirmation", f"segresmamba_equal_time{end}", k)["cases"] for end in ("", "_half"))
        for name, values in whole.items():
            other = half[name]["val_mean_dice"]
            by_class = max(by_class, *(abs(value - other[label]) for label, value in values["val_mean_dice"].items()))
    assert f"no class of a case by more than {by_class:.4f}." in page_text()
    assert f"changed no case's Dice by more than {most:.4f}, no class's by more than {by_class:.4f}." in card


def test_tom(tmp_path):
    """At as many steps and in nearly equal time, over the folds."""
    text = page_text()
    steps = [
        f"{-float(value):+.4f}"
        for value in re.findall(r"[+-]0\.\d{4}", row("confirmation_report", "without_tom", "folds.md")[-1])
    ]
    time = re.findall(r"[+-]0\.\d{4}", row("tom_report", "segresmamba_equal_time", "folds.md")[-1])
    assert (
        f"at as many steps Dice is {in_words(steps[0])} with it (95 % over the folds {steps[2]} to {steps[1]})" in text
    )
    assert f"of equal time {in_words(time[0])} ({time[1]} to {time[2]})" in text
    assert float(steps[2]) < 0 < float(steps[1]) and float(time[1]) < 0 < float(time[2])
    assert f"Gains of more than {max(float(steps[1]), float(time[2])):.3f} are unlikely" in text
    for name, arm in (("confirmation_report", "without_tom"), ("tom_report", "segresmamba_equal_time")):
        assert min(float(row(name, arm, table=table)[-1]) for table in range(4)) > 0.05
    segresnet = tmp_path / "segresnet"
    arms = ("segresnet", "segresmamba_equal_time")
    report(str(EVIDENCE / "confirmation"), output_dir=str(segresnet), reference="segresnet", arms=arms)
    less = re.findall(r"[+-]0\.\d{4}", (segresnet / "folds.md").read_text().splitlines()[-1])
    assert f"their Dice is {in_words(less[0])} (95 % over the folds {less[1]} to {less[2]})" in text
    means = [
        statistics.mean(
            case["val_mean_dice"]["mean"]
            for k in range(1, 5)
            for case in read("confirmation", arm, k)["cases"].values()
        )
        for arm in ("segresmamba", "without_tom")
    ]
    assert f"the mean Dice is {means[0]:.4f} with ToM and {means[1]:.4f} without" in text


def test_tom_without_the_path_at_full_resolution():
    """At as many steps, and in equal time."""
    without, with_tom, longer = (
        [reached(read("screening", arm, 0, seed)) for seed in range(3)] for arm in _WITHOUT_SKIP
    )
    means = [statistics.mean(values) for values in (with_tom, without, longer)]
    steps, time = ttest_ind(with_tom, without), ttest_ind(longer, with_tom)
    (low, high), (low_time, high_time) = (found.confidence_interval() for found in (steps, time))
    text = page_text()
    assert (
        f"{means[0]:.4f} with it and {means[1]:.4f} without ({means[0] - means[1]:+.4f}, 95 % over the seeds "
        f"{low:+.4f} to {high:+.4f}, t-test p = {steps.pvalue:.2f})" in text
    )
    epochs = read("screening", _WITHOUT_SKIP[2])["overrides"]["max_epochs"]
    assert (
        f"with {epochs} epochs in place of 12, equal time by that ratio, the network without it reaches "
        f"{means[2]:.4f}, {means[2] - means[0]:.4f} more than with it ({low_time:+.4f} to {high_time:+.4f}, "
        f"p = {time.pvalue:.2f})" in text
    )
    readme = " ".join((BUNDLE_ROOT / "README.md").read_text().split())
    assert f"a gain at as many steps ({means[0] - means[1]:.3f}, p = {steps.pvalue:.2f}) and none in equal" in readme
    assert f"without them is ahead by {means[2] - means[0]:.3f} (p = {time.pvalue:.2f})" in readme


def test_segresnet_in_the_screening():
    ours, other = ([reached(read("screening", arm, 0, seed)) for seed in range(3)] for arm in ("base", "segresnet"))
    surface = row("screening_report", "segresnet", table=2)[3]
    more = statistics.mean(other) - statistics.mean(ours)
    assert (
        f"by {more:.4f} (three seeds each, p = {ttest_ind(ours, other).pvalue:.2f}; {float(surface[:7]):.3f} in surface"
        in page_text()
    )


def test_what_was_not_run_is_named():
    """Of the arms in the plans."""
    text = page_text().partition("## Not measured")[2].partition("## How it is measured")[0]
    runs = [
        (plan, run) for plan in ("screening", "confirmation") for run in planned_runs(str(EVIDENCE / f"{plan}.yaml"))
    ]
    missing = {run.arm for plan, run in runs if EVIDENCE / plan / f"{run.name}.json" not in RESULTS}
    assert set(re.findall("`(.*?)`", text)) == missing


def test_what_is_said_in_short():
    text = page_text()
    scores = json.loads((BUNDLE_ROOT / "configs" / "metadata.json").read_text())["eval_metrics"]
    dice, hd95 = row("confirmation_report", "segresmamba"), row("confirmation_report", "segresmamba", table=1)
    assert f"mean Dice {dice[2]}, HD95 {millimetres(hd95[2])}: five folds, {scores['cases']} held-out" in text
    assert scores["mean_dice"] == float(dice[2][:6]) and f"missed by {0.89 - scores['mean_dice']:.3f}" in text
    assert scores["mean_hd95_mm"] < 1.5  # met
    folds = sorted(row("confirmation_report", "segresmamba", "folds.md")[:5])
    assert f"by fold {folds[0]} to {folds[-1]}" in text
    by_fold = [reached(read("confirmation", "segresmamba", k), "val_hd95") for k in range(5)]
    assert f"not on every fold ({min(by_fold):.2f} to {max(by_fold):.2f})" in text
    excluded = [row("confirmation_report", arm, "folds.md")[-1] for arm in ("segresnet", "dynunet")]
    bounds = [re.findall(r"\+0\.\d{4}", cell)[-1][1:] for cell in excluded]
    assert f"worse than SegResNet by more than {bounds[0]} and than DynUNet by more than {bounds[1]}" in text
    readme = " ".join((BUNDLE_ROOT / "README.md").read_text().split())
    arms = ("segresmamba", "without_tom", "segresmamba_equal_time", "segresnet", "dynunet")
    others = [row("confirmation_report", arm)[2][:6] for arm in arms]
    assert f"mean Dice {others[0]} with them and {others[1]} without" in readme
    assert f"at as many steps, and {others[2]} with them in 0.89 of equal time" in readme
    costs = json.loads((EVIDENCE / "efficiency-hippocampus-float32.json").read_text())["rows"]
    step = {cost["network"]: cost["training"]["median"] for cost in costs if cost["setup"] == "Hippocampus, wide"}
    ours = step["segresmamba_text"]
    as_trained = dynunet_as_trained()
    costs = json.loads((EVIDENCE / "efficiency-hippocampus.json").read_text())["rows"]
    half = {cost["network"]: cost["training"]["median"] for cost in costs if cost["setup"] == "Hippocampus, wide"}
    half = {name: seconds / half["segresmamba_text"] for name, seconds in half.items()}
    assert (
        f"MONAI's SegResNet reaches {others[3]} over the same five folds in {half['segresnet']:.2f} of the time of a "
        f"step in bf16, in which both were trained ({step['segresnet'] / ours:.2f} in float32), its DynUNet, in "
        f"float32, {others[4]} in {as_trained:.1f} times the time" in readme
    )
    without = row("confirmation_report", "without_tom"), row("confirmation_report", "without_tom", table=1)
    card = " ".join((BUNDLE_ROOT / "docs" / "README.md").read_text().split())
    assert f"reaches {float(without[0][2][:6]):.3f} and {float(without[1][2][:6]):.2f} mm" in card


def test_what_nnunet_reached():
    result = json.loads((EVIDENCE / "nnunet" / "nnunet-fold0.json").read_text())
    text = page_text()
    steps = f"{result['num_epochs']} epochs of {result['iterations_per_epoch']} steps"
    assert f"patches of {' × '.join(map(str, result['patch_size']))} voxels, batches of {result['batch_size']}" in text
    assert f"a network of {result['parameters'] / 1e6:.1f} million parameters, and was given {steps}" in text
    assert f"reaches after {result['num_epochs'] * result['iterations_per_epoch']} steps, not what it can" in text
    dice, hd95 = row("nnunet_report", "nnunet"), row("nnunet_report", "nnunet", table=1)
    assert f"Its Dice is {dice[2]}, its HD95 {millimetres(hd95[2])}." in text
    other = read("confirmation", "segresmamba")
    assert f"SegResMamba's {reached(other):.4f} on this fold" in text
    assert other["cases"].keys() == result["cases"].keys()


def test_the_end_of_the_learning_curves():
    rises = []
    for arm in ("segresmamba", "segresnet", "dynunet"):
        curves = [
            {row["epoch"]: row["val_mean_dice"] for row in read("confirmation", arm, fold)["curve"]}
            for fold in range(5)
        ]
        rises.append(statistics.mean(float(curve["40"]) - float(curve["30"]) for curve in curves))
    values = [f"{rise:.3f}" for rise in rises]
    assert f"by {values[0]} for SegResMamba, {values[1]} for SegResNet and {values[2]} for DynUNet" in page_text()


def dynunet_as_trained():
    """Time of its step, in channels-last, over SegResMamba's."""
    ours, other = json.loads((EVIDENCE / "efficiency-hippocampus-dynunet.json").read_text())["rows"]
    assert (ours["network"], other["network"]) == ("segresmamba_text", "dynunet")
    return other["training"]["median"] / ours["training"]["median"]


def test_the_costs_in_the_text_are_those_measured():
    text = (BUNDLE_ROOT / "docs" / "evidence.md").read_text()
    ratios, ours = {}, {}
    for file in ("efficiency-hippocampus", "efficiency-hippocampus-float32"):
        rows = json.loads((EVIDENCE / f"{file}.json").read_text())["rows"]
        for setup in {row["setup"]: None for row in rows}:
            seconds = {row["network"]: row["training"]["median"] for row in rows if row["setup"] == setup}
            ours[setup] = seconds["segresmamba_text"]
            names = [name for name in seconds if name != "segresmamba_text"]
            ratios[file, setup] = [seconds[name] / seconds["segresmamba_text"] for name in names]
            assert names == ["segresmamba_without_tom", "segresnet", "dynunet", "unet", "swin_unetr"][: len(names)]
            label = {"Hippocampus": "base"}.get(setup, setup.removeprefix("Hippocampus, "))
            assert f"| {label} | {' | '.join(f'{ratio:.2f}' for ratio in ratios[file, setup])} |" in text
    wide, wide_float32 = (ratios[file, "Hippocampus, wide"] for file in ("efficiency-hippocampus", file))
    text = page_text()
    for k in range(2):  # without ToM, and SegResNet
        assert f"a step takes {wide_float32[k]:.2f} of the time in float32, {wide[k]:.2f} in bf16" in text
    assert f"With ToM a step takes 1 / {wide_float32[0]:.2f} of the time" in text
    assert text.count(f"{28 / 40 / wide_float32[0]:.2f} of equal time") == 2  # in short, and where it is measured
    papers = ratios["efficiency-hippocampus", "Hippocampus, without the full-resolution skip"]
    assert f"Without it a step takes {papers[0]:.2f} of the time there" in text
    as_trained = f"{dynunet_as_trained():.2f} times"
    assert f"Its step takes {as_trained} as long in the memory layout that it was trained in, " in text
    assert f", {wide_float32[2]:.2f} times in the usual one" in text and f"{as_trained} SegResMamba's step" in text
    assert text.count(f"{ours['Hippocampus, stem of stride 1'] / ours['Hippocampus']:.1f} times the time") == 2
    assert f"the 28 epochs take {28 / 40 / wide_float32[1]:.2f} of equal time" in text
    card = " ".join((BUNDLE_ROOT / "docs" / "README.md").read_text().split())
    assert f"with {wide_float32[0]:.2f} of the time of a training step in float32" in card
    assert f"in {wide[1]:.2f} of the time of a training step in bf16 ({wide_float32[1]:.2f} in float32)" in card
    for step, name in (("inference", "inference"), ("training", "training step")):
        cost = rows[0][step]
        assert f"| {name} | {cost['median']:.2f} s | {cost['peak_mib']:,} MiB |" in card


def test_what_the_text_says_of_longer_trainings():
    text = page_text()
    runs = {file.stem: json.loads(file.read_text()) for file in RESULTS if file.parent.name in ("longer", "augmented")}
    curve = {int(row["epoch"]): row for row in runs["longer-fold0-seed0"]["curve"]}
    losses = [float(curve[epoch]["train_mean_loss"]) for epoch in (60, 120)]
    assert (
        f"level from epoch 60 on, while the loss of the training falls from {losses[0]:.3f} to {losses[1]:.3f}" in text
    )
    assert max(float(curve[epoch]["val_mean_dice"]) for epoch in (80, 100, 120)) <= float(curve[60]["val_mean_dice"])
    dice = {name.split("-")[0]: reached(run) for name, run in runs.items()}
    for arm in ("longer", "augmented"):
        assert f"Test-time flipping adds about {dice[f'{arm}_flipping'] - dice[arm]:.3f}" in text
    shorter, dice["segresnet"] = (reached(read("confirmation", arm)) for arm in ("segresmamba", "segresnet"))
    assert max(dice.values()) < shorter  # neither is better
    assert f"and SegResNet's, lie between {min(dice.values()):.3f} and {max(dice.values()):.3f} here" in text
    assert row("longer_report", "longer_larger_window", table=3)[3].startswith("+")
    assert float(row("longer_report", "longer_larger_window", table=3)[-1]) < 0.05
