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

import numpy as np
import pytest
from matplotlib.image import imread
from scipy.stats import ttest_rel, wilcoxon

from scripts.report import Comparison, holm, read_evaluations, report

CASES = [f"case_{k:02}.nii.gz" for k in range(20)]


@pytest.fixture
def evaluations(tmp_path):
    """Three folders as an evaluation writes them: b is a little worse than a in every case, c is a with noise."""
    generator = np.random.default_rng(0)
    good = generator.uniform(0.7, 0.9, (len(CASES), 2))
    values = {"a": good, "b": good - 0.05, "c": good + generator.normal(0, 0.01, good.shape)}
    for name, dice in values.items():
        for metric, scale in (("val_mean_dice", 1), ("val_hd95", 10)):
            write(tmp_path / name, metric, CASES, scale * dice)
    return tmp_path, values


def write(folder, metric, cases, values):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{metric}_raw.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filename", "liver", "spleen", "mean"])
        writer.writerows([f"/somewhere/{case}", *row, row.mean()] for case, row in zip(cases, values))


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Holm's own steps by hand
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_comparison(evaluations):
    folder, values = evaluations
    found = {}
    for name in "abc":
        found |= read_evaluations(folder / name)
    rows = {(row["metric"], row["name"]): row for row in Comparison(found, "a").rows}
    assert len(rows) == 6
    worse, noisy = rows["val_mean_dice", "b"], rows["val_mean_dice", "c"]
    assert worse["difference"]["mean"] == pytest.approx(-0.05) and worse["p_holm"] < 0.001
    assert worse["spleen"]["mean"] == pytest.approx(values["b"][:, 1].mean())
    assert noisy["difference"]["ci95_low"] < noisy["difference"]["mean"] < noisy["difference"]["ci95_high"]
    assert noisy["p"] == pytest.approx(wilcoxon((values["c"] - values["a"]).mean(1)).pvalue)
    assert noisy["p_holm"] == pytest.approx(noisy["p"])  # the larger of two
    assert worse["p_holm"] == pytest.approx(2 * worse["p"])
    assert "p" not in rows["val_hd95", "a"]


def test_volume_errors_of_opposite_signs_do_not_cancel(tmp_path):
    signs = np.where(np.arange(40).reshape(20, 2) % 3 == 0, 1.0, -1.0)
    write(tmp_path / "wrong", "val_volume_error", CASES, 5.0 * signs)
    write(tmp_path / "nearly", "val_volume_error", CASES, 0.1 * signs)
    found = read_evaluations(tmp_path / "wrong") | read_evaluations(tmp_path / "nearly")
    row = Comparison(found, "wrong").rows[1]
    assert row["difference"]["mean"] == pytest.approx(-4.9) and row["p"] < 0.001


def test_equal_evaluations_do_not_differ(evaluations):
    cases = read_evaluations(evaluations[0] / "a")["a"]
    row = Comparison({"one": cases, "two": cases}, "one").rows[1]
    assert row["p"] == 1 and row["difference"]["mean"] == 0


def test_the_files(evaluations):
    folder, _ = evaluations
    folders = [str(folder / name) for name in "abc"]
    report(*folders, output_dir=str(folder / "out"), names=["ours, wide", "theirs"], reference="c")
    text = (folder / "out" / "comparison.md").read_text()
    assert "| ours, wide |" in text and "| theirs |" in text and "difference to c" in text
    assert "**Dice**, 20 cases" in text and "Hausdorff" in text
    rows = list(csv.DictReader(open(folder / "out" / "comparison.csv")))
    assert [row["name"] for row in rows] == ["ours, wide", "theirs", "c"] * 2
    assert float(rows[0]["liver_mean"]) > float(rows[1]["liver_mean"])
    for picture in ("comparison", "differences"):
        assert min(imread(folder / "out" / f"{picture}.png").shape[:2]) > 300
    cells = [line.strip("| ").split(" | ") for line in (folder / "out" / "overview.md").read_text().splitlines()]
    assert [line[0] for line in cells[2:]] == ["ours, wide", "theirs", "c"] and len(cells[2]) == len(cells[0]) + 1 == 7
    assert all(f"| {' | '.join(cells[2][part])} |" in text for part in (slice(1, 4), slice(4, 7)))
    report(folders[0], output_dir=str(folder / "one"), names=2024)  # as fire reads it
    assert "| 2024 |" in (folder / "one" / "comparison.md").read_text()
    assert not (folder / "one" / "differences.png").exists()  # to nothing


def result(folder, arm, fold, seed, cases, dice):
    """A file as the runner writes it."""
    content = {"arm": arm, "fold": fold, "seed": seed}
    content["cases"] = {c: {"val_mean_dice": {"liver": d, "spleen": d, "mean": d}} for c, d in zip(cases, dice)}
    content["curve"] = [{"epoch": "1", "val_mean_dice": ""}, {"epoch": "2", "val_mean_dice": str(dice[0])}]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{arm}-fold{fold}-seed{seed}.json").write_text(json.dumps(content))


def test_a_cross_validation_is_read_and_only_common_cases_count(tmp_path, evaluations, capsys):
    folder, values = evaluations
    for fold, part in enumerate((slice(0, 10), slice(10, 18))):
        result(tmp_path / "crossed" / "results", "cross_validation", fold, 0, CASES[part], values["b"][part, 0])
    write(tmp_path / "crossed" / "test", "val_mean_dice", CASES, values["c"])  # the ensemble's, no part of it
    assert list(read_evaluations(tmp_path / "crossed")) == ["crossed"]
    report(str(folder / "a"), str(tmp_path / "crossed"), output_dir=str(tmp_path / "out"))
    assert "**Dice**, 18 cases" in (tmp_path / "out" / "comparison.md").read_text()
    assert "2 cases that not all have were left out" in capsys.readouterr().out


def test_results_of_the_runner(tmp_path):
    """Seeds are averaged case by case, and the learning curves are drawn; a fold that one arm lacks does not count."""
    for arm, seed, dice in (("base", 0, 0.8), ("base", 1, 0.9), ("other", 0, 0.7)):
        result(tmp_path, arm, 0, seed, CASES, [dice] * len(CASES))
    result(tmp_path, "base", 1, 0, ["of_another_fold"], [0.1])
    found = read_evaluations(tmp_path)
    assert found["base"]["val_mean_dice"][CASES[0]]["liver"] == pytest.approx(0.85)
    report(str(tmp_path), output_dir=str(tmp_path / "out"), arms="other, base")  # as the command line may have it
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert text.index("| other |") < text.index("| base |") and "+0.1500" in text
    runs = (tmp_path / "out" / "runs.md").read_text()
    assert "| base | 1 | 2 | 0.8000, 0.9000 | 0.0707 | +0.1500 ± 1.1004 |" in runs  # 12.706, t's quantile, 0.0707, √1.5
    assert "| other | 1 | 1 | 0.7000 |  |  |" in runs and not (tmp_path / "out" / "folds.md").exists()
    assert (tmp_path / "out" / "learning_curves.png").stat().st_size > 5000


def test_arms_without_a_curve(tmp_path):
    """Such as those that evaluate the weights of others."""
    for arm in ("base", "other"):
        result(tmp_path, arm, 0, 0, CASES, [0.8] * len(CASES))
        file = tmp_path / f"{arm}-fold0-seed0.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "curve": []}))
    report(str(tmp_path), output_dir=str(tmp_path / "out"))
    assert (tmp_path / "out" / "runs.md").is_file() and not (tmp_path / "out" / "learning_curves.png").exists()


def test_the_ranges_in_the_picture_of_differences(tmp_path):
    """Those over the cases, over the folds and of seeds alone, where they are known, best first."""
    for arm, shift in (("base", 0.0), ("worse", -0.02), ("better", 0.03)):
        for fold in range(3):
            for seed in (0, 1) if arm == "base" else (0,):
                cases = [f"{fold}_{k}" for k in range(10)]
                dice = 0.7 + 0.01 * np.arange(10) + shift * (1 + 0.1 * fold) + 0.001 * seed
                result(tmp_path, arm, fold, seed, cases, list(dice))
    comparison = Comparison(read_evaluations(tmp_path), "base")
    folds, seeds = {"worse": (-0.02, 0.01), "better": (0.03, 0.01)}, {"worse": (-0.02, 0.005)}
    (axis,) = comparison.differences(folds, seeds).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["better", "worse"]
    assert axis.get_legend_handles_labels()[1] == ["seeds alone", "over folds", "over cases"]
    assert [patch.get_width() for patch in axis.patches] == [0, pytest.approx(0.01)]
    (axis,) = comparison.differences({}, {}).axes
    assert axis.get_legend_handles_labels()[1] == ["over cases"] and not axis.patches


def test_folds(tmp_path):
    """Each fold's mean, and the interval of the differences: a paired t-test's, √(1 + 3 / 2) times as wide."""
    reached = {"base": (0.80, 0.82, 0.84), "other": (0.81, 0.85, 0.84)}
    for arm, folds in reached.items():
        for fold, dice in enumerate(folds):
            result(tmp_path, arm, fold, 0, [f"{fold}_{k}" for k in range(10)], [dice] * 10)
    report(str(tmp_path), output_dir=str(tmp_path / "out"), reference="base")
    interval = ttest_rel(reached["other"], reached["base"]).confidence_interval()
    half = (interval.high - interval.low) / 2 * 2.5**0.5
    table = (tmp_path / "out" / "folds.md").read_text()
    assert "| base | 0.8000 | 0.8200 | 0.8400 |  |" in table
    assert f"| other | 0.8100 | 0.8500 | 0.8400 | +0.0133 [{0.04 / 3 - half:+.4f}, {0.04 / 3 + half:+.4f}] |" in table


def test_seeds_that_are_not_done_on_all_folds_do_not_count(tmp_path):
    """Folds differ more than seeds do."""
    for arm, seed, folds in (
        ("base", 0, (0.80, 0.90)),
        ("base", 1, (0.82, 0.92)),
        ("base", 2, (0.80,)),
        ("b", 0, (1, 1)),
    ):
        for fold, dice in enumerate(folds):
            result(tmp_path, arm, fold, seed, [f"{fold}_{k}" for k in range(10)], [dice] * 10)
    report(str(tmp_path), output_dir=str(tmp_path / "out"), reference="base")
    table = (tmp_path / "out" / "runs.md").read_text()
    assert "| base | 2 | 2 | 0.8500, 0.8700 | 0.0141 |  |" in table
    assert "| b | 2 | 1 | 1.0000 |  | +0.1400 ± 0.2201 |" in table  # 12.706, 0.0141, √1.5


def test_what_cannot_be_compared_is_one_clear_error(tmp_path, evaluations):
    folder, values = evaluations
    out = str(tmp_path / "out")
    write(tmp_path / "others", "val_mean_dice", ["x.nii.gz", "y.nii.gz"], values["a"][:2])
    with pytest.raises(ValueError, match="no case in common"):
        report(str(folder / "a"), str(tmp_path / "others"), output_dir=out)
    with pytest.raises(ValueError, match="there is no evaluation 'd'; there are: a, b"):
        report(str(folder / "a"), str(folder / "b"), output_dir=out, reference="d")
    with pytest.raises(ValueError, match="another evaluation called a"):
        report(str(folder / "a"), str(folder / "a"), output_dir=out)
    with pytest.raises(ValueError, match="another evaluation called z"):
        report(str(folder / "a"), str(folder / "b"), output_dir=out, names=["z", "z"])
    for name, metric in (("other_metric", "val_hd95"), ("one_metric", "val_mean_dice")):
        write(tmp_path / name, metric, CASES, values["a"])
    with pytest.raises(ValueError, match="no metric in common"):
        report(str(tmp_path / "other_metric"), str(tmp_path / "one_metric"), output_dir=out)
    result(tmp_path / "classes", "x", 0, 0, CASES, [0.5] * 20)
    changed = (tmp_path / "classes" / "x-fold0-seed0.json").read_text().replace("spleen", "kidney")
    (tmp_path / "classes" / "x-fold0-seed0.json").write_text(changed)
    with pytest.raises(ValueError, match="x has other classes, liver, kidney, mean, than liver, spleen, mean"):
        report(str(tmp_path / "one_metric"), str(tmp_path / "classes"), output_dir=out)
    with pytest.raises(ValueError, match="nothing.*there is no evaluation in it"):
        (tmp_path / "nothing").mkdir()
        report(str(tmp_path / "nothing"), output_dir=out)
    with pytest.raises(ValueError, match="no arm z"):
        report(str(folder / "a"), output_dir=out, arms=["z"])
    assert not (tmp_path / "out").exists()
