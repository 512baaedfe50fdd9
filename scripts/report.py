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
"""One comparison out of several evaluations: a table with paired tests, box plots and learning curves."""

from __future__ import annotations

import csv
import io
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from scripts.clear_errors import listed
from scripts.evaluation import read_cases, statistics
from scripts.output import markdown_table, new_figure, save_figure, write_text
from scripts.run_results import (
    curves,
    folds_table,
    intervals_over_folds,
    means_of_folds,
    means_of_seeds,
    ranges_from_seeds,
    read_runs,
    seeds_table,
)

__all__ = ["Comparison", "holm", "read_evaluations", "report"]

Cases = dict[str, dict[str, dict[str, float]]]
"""Values by metric, case and class; "mean" among the classes is the mean of them."""

METRICS = {
    "val_mean_dice": "Dice",
    "val_hd95": "95 % Hausdorff distance, mm",
    "val_surface_dice": "Surface Dice",
    "val_volume_error": "Absolute volume error, ml",
}


def read_evaluations(path: str | os.PathLike) -> dict[str, Cases]:
    """
    The values of each case out of what evaluations have written.

    Args:
        path: an evaluation's folder, or a folder of :py:mod:`scripts.experiments`' results, of which each arm is one
            (cases with several seeds are averaged), or that of :py:mod:`scripts.cross_validation`.

    Returns:
        by name (of the folder or the arm) the values.

    Raises:
        ValueError: When there is no evaluation in the folder.
    """
    folder = Path(path)
    own_name, crossed = folder.resolve().name, (folder / "results").is_dir()
    sources = [
        (own_name if crossed else r["arm"], r["cases"]) for r in read_runs(folder / "results" if crossed else folder)
    ]
    found: dict[str, Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(list))))
    for name, cases in sources or [(own_name, read_cases(folder))]:
        for case, metrics in cases.items():
            for metric, values in metrics.items():
                for label, value in values.items():
                    found[name][metric][case][label].append(value)
    if not found:
        raise ValueError(
            f"{folder}: there is no evaluation in it; expected the files that configs/evaluate.json or "
            "scripts.experiments write (val_mean_dice_raw.csv, ..., or a JSON file for each run)."
        )
    return {
        name: {
            metric: {
                case: {label: float(np.mean(values)) for label, values in labels.items()}
                for case, labels in cases.items()
            }
            for metric, cases in metrics.items()
        }
        for name, metrics in found.items()
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """
    Holm's correction for several tests.

    Args:
        p_values: of the tests.

    Returns:
        the corrected values, in the same order; those below a level are found by a procedure whose chance of any false
        finding is at most that level.
    """
    order = np.argsort(p_values)
    scaled = np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(1, np.maximum.accumulate(scaled))
    return corrected.tolist()


class Comparison:
    """
    Evaluations on the same cases, each against one of them.

    Args:
        evaluations: values by name, see :py:func:`read_evaluations`. Cases that not all have are left out.
        reference: name of the one to compare the others with.

    Raises:
        ValueError: When there is no such evaluation, or they have no case or metric in common, or other classes.
    """

    def __init__(self, evaluations: Mapping[str, Cases], reference: str) -> None:
        if reference not in evaluations:
            raise ValueError(f"there is no evaluation {reference!r}; there are: {', '.join(evaluations)}.")
        self.reference = reference
        self.names = list(evaluations)
        per_evaluation = [set.intersection(*(set(cases) for cases in e.values())) for e in evaluations.values()]
        self.cases = sorted(set.intersection(*per_evaluation))
        if not self.cases:
            raise ValueError(f"{', '.join(evaluations)} have no case in common.")
        self.left_out = len(set.union(*per_evaluation)) - len(self.cases)
        first = next(iter(evaluations.values()))
        self.metrics = [metric for metric in first if all(metric in e for e in evaluations.values())]
        if not self.metrics:
            raise ValueError(f"{', '.join(evaluations)} have no metric in common.")
        self.metrics.sort(key=lambda metric: (list(METRICS).index(metric) if metric in METRICS else 99, metric))
        self.labels = list(first[self.metrics[0]][self.cases[0]])
        for name, evaluation in evaluations.items():
            labels = list(evaluation[self.metrics[0]][self.cases[0]])
            if labels != self.labels:
                raise ValueError(f"{name} has other classes, {', '.join(labels)}, than {', '.join(self.labels)}.")
        self._values = evaluations

    def values(self, name: str, metric: str, label: str = "mean") -> np.ndarray:
        """
        Args:
            name: of the evaluation.
            metric: such as "val_mean_dice".
            label: a class, or "mean".

        Returns:
            the values of the common cases, in the order of ``cases``; volume errors without their sign, since those
            of opposite signs would cancel out.
        """
        values = self._values[name][metric]
        if metric != "val_volume_error":
            return np.array([values[case][label] for case in self.cases])
        if label != "mean":
            return np.abs([values[case][label] for case in self.cases])
        classes = [label for label in self.labels if label != "mean"]
        return np.abs([[values[case][label] for label in classes] for case in self.cases]).mean(1)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """
        Returns:
            for each metric and evaluation: the statistics of each class and of the mean, and, but for the reference,
            the mean difference to it with its bootstrap interval and the p-value of Wilcoxon's signed-rank test on the
            cases' means, plain and after Holm's correction for the comparisons of this metric.
        """
        rows = []
        for metric in self.metrics:
            tested = []
            for name in self.names:
                row: dict[str, Any] = {"metric": metric, "name": name, "cases": len(self.cases)}
                row |= {label: statistics(self.values(name, metric, label)) for label in self.labels}
                if name != self.reference:
                    differences = self.values(name, metric) - self.values(self.reference, metric)
                    row["difference"] = statistics(differences)
                    row["p"] = float(wilcoxon(differences).pvalue) if differences.any() else 1.0
                    tested.append(row)
                rows.append(row)
            for row, corrected in zip(tested, holm([row["p"] for row in tested])):
                row["p_holm"] = corrected
        return rows

    def markdown(self) -> str:
        """
        Returns:
            a table for each metric.
        """
        text = ""
        rows = self.rows
        for metric in self.metrics:
            mine = [row for row in rows if row["metric"] == metric]
            classes = [label for label in self.labels if label != "mean"]
            head = ["", *classes, "mean [95 % CI]", f"difference to {self.reference} [95 % CI]", "p (Holm)"]
            text += f"**{METRICS.get(metric, metric)}**, {len(self.cases)} cases, mean ± standard deviation\n\n"
            lines = []
            for row in mine:
                cells = [row["name"], *(f"{row[label]['mean']:.3f} ± {row[label]['std']:.3f}" for label in classes)]
                cells.append(_interval(row["mean"]))
                if row["name"] == self.reference:
                    cells += ["", ""]
                else:
                    cells += [_interval(row["difference"], "+"), _p(row["p_holm"])]
                lines.append(cells)
            text += markdown_table(head, lines) + "\n\n"
        return text

    def overview(self) -> str:
        """
        Returns:
            one table of the first two metrics, means of the classes.
        """
        head = [""]
        table = {name: [name] for name in self.names}
        for metric in self.metrics[:2]:
            head += [f"{METRICS.get(metric, metric)} [95 % CI]", "difference [95 % CI]", "p (Holm)"]
            for row in (row for row in self.rows if row["metric"] == metric):
                compared = [_interval(row["difference"], "+"), _p(row["p_holm"])] if "difference" in row else ["", ""]
                table[row["name"]] += [_interval(row["mean"]), *compared]
        return markdown_table(head, table.values()) + "\n"

    def differences(
        self, over_folds: Mapping[str, tuple[float, float]], from_seeds: Mapping[str, tuple[float, float]]
    ) -> Any:
        """
        Args:
            over_folds: by name the mean of the folds' differences in Dice, and half its interval; may be empty.
            from_seeds: by name the difference in Dice, and half the range that seeds alone give it; may be empty.

        Returns:
            a figure of the first two metrics: the mean differences to the reference and their intervals, in the order
            of the first.
        """
        metrics = self.metrics[:2]
        found = {metric: {r["name"]: r for r in self.rows if r["metric"] == metric} for metric in metrics}
        others = [name for name in self.names if name != self.reference]
        others.sort(key=lambda name: found[metrics[0]][name]["difference"]["mean"], reverse=True)
        places = np.arange(len(others))
        figure, axes = new_figure(1, len(metrics))
        figure.set_figheight(1.6 + 0.3 * len(others))
        for axis, metric in zip(axes[0], metrics):
            shown = [found[metric][name]["difference"] for name in others]
            mean, low, high = (np.array([row[key] for row in shown]) for key in ("mean", "ci95_low", "ci95_high"))
            if metric == "val_mean_dice" and from_seeds:
                chance = [from_seeds[name][1] if name in from_seeds else 0.0 for name in others]
                axis.barh(places, 2 * np.array(chance), left=-np.array(chance), color="0.9", label="seeds alone")
            if metric == "val_mean_dice" and over_folds:
                middle, half = np.array([over_folds[name] for name in others]).T
                axis.errorbar(middle, places + 0.2, xerr=half, fmt="none", ecolor="tab:orange", label="over folds")
            axis.errorbar(mean, places, xerr=(mean - low, high - mean), fmt="o", markersize=4, label="over cases")
            axis.axvline(0, color="0.5", linewidth=1)
            axis.set_yticks(places, others if metric == metrics[0] else [""] * len(others))
            axis.set_ylim(len(others) - 0.5, -0.5)
            axis.grid(alpha=0.3, axis="x")
            axis.set(xlabel=f"{METRICS.get(metric, metric)}: difference to {self.reference}")
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3, title="95 % ranges")
        return figure

    def box_plots(self) -> Any:
        """
        Returns:
            a figure: for each metric the distribution of the cases' means, by evaluation.
        """
        columns = min(2, len(self.metrics))
        figure, axes = new_figure(-(-len(self.metrics) // columns), columns)
        places = [axis for row in axes for axis in row]
        for axis in places[len(self.metrics) :]:
            axis.set_axis_off()
        for axis, metric in zip(places, self.metrics):
            values = [self.values(name, metric) for name in self.names]
            axis.boxplot(values, tick_labels=self.names, orientation="horizontal", showmeans=True, meanline=True)
            axis.set(xlabel=METRICS.get(metric, metric), title=f"{len(self.cases)} cases, mean of the classes")
            axis.invert_yaxis()
            axis.grid(alpha=0.3, axis="x")
        return figure


def report(
    *results: str, output_dir: str, names: Sequence[str] = (), reference: str = "", arms: Sequence[str] = ()
) -> None:
    """
    Compare evaluations: comparison.md and comparison.csv with a row for each, overview.md with the first two metrics in
    one table, comparison.png with box plots, differences.png with the differences to the reference, and, of the
    runner's results, on the folds that all have, runs.md with what each seed of an arm reached, folds.md with each fold
    where there are several, and learning_curves.png where trainings were validated.

    Args:
        results: folders, see :py:func:`read_evaluations`.
        output_dir: where to write.
        names: of the evaluations, in place of the folders' (or arms').
        reference: the one that the others are compared with; the first where nothing is given.
        arms: of the runner's results, these alone and in this order.

    Raises:
        ValueError: When there is nothing to compare, two are called the same, or ``reference`` is none of them.
    """
    found: dict[str, Cases] = {}
    own_names, arms = listed(names), listed(arms)
    for folder in results:
        for name, cases in read_evaluations(folder).items():
            name = own_names.pop(0) if own_names else name
            if name in found:
                raise ValueError(f"{folder}: there is another evaluation called {name}: tell them apart with --names.")
            found[name] = cases
    if arms:
        missing = [arm for arm in arms if arm not in found]
        if missing:
            raise ValueError(f"there is no arm {', '.join(missing)}; there are: {', '.join(found)}.")
        found = {arm: found[arm] for arm in arms}
    if not found:
        raise ValueError("give the folders of the evaluations to compare.")
    comparison = Comparison(found, reference or next(iter(found)))
    output = Path(output_dir)
    table = comparison.markdown()
    write_text(output / "comparison.md", table)
    write_text(output / "comparison.csv", _csv(comparison.rows))
    write_text(output / "overview.md", comparison.overview())
    save_figure(comparison.box_plots(), output / "comparison.png")
    runs = {arm: [run for folder in results for run in read_runs(folder) if run["arm"] == arm] for arm in found}
    shared = set.intersection(*({run["fold"] for run in mine} for mine in runs.values()))
    runs = {arm: [run for run in mine if run["fold"] in shared] for arm, mine in runs.items()}
    over_folds, from_seeds = {}, {}
    if all(runs.values()):
        means = means_of_seeds(runs)
        from_seeds = ranges_from_seeds(means, comparison.reference)
        write_text(output / "runs.md", seeds_table(means, len(shared), from_seeds, comparison.reference))
        if len(shared) > 1:
            by_fold = means_of_folds(runs)
            over_folds = intervals_over_folds(by_fold, comparison.reference)
            write_text(output / "folds.md", folds_table(by_fold, over_folds, comparison.reference))
        drawn = curves(runs)
        if drawn is not None:
            save_figure(drawn, output / "learning_curves.png")
    if len(found) > 1:
        save_figure(comparison.differences(over_folds, from_seeds), output / "differences.png")
    print(table)
    if comparison.left_out:
        print(f"{comparison.left_out} cases that not all have were left out.")
    print(f"Written to {output}.")


def _interval(found: Mapping[str, float], sign: str = "") -> str:
    return f"{found['mean']:{sign}.4f} [{found['ci95_low']:{sign}.4f}, {found['ci95_high']:{sign}.4f}]"


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Nested values as columns ``label_statistic``."""
    flat = []
    for row in rows:
        cells: dict[str, Any] = {}
        for key, value in row.items():
            cells |= {f"{key}_{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
        flat.append(cells)
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in flat for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


if __name__ == "__main__":
    from scripts.clear_errors import command

    command(report)
