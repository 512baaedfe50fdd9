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
"""What the trainings of each arm reached, by fold and by seed, out of the runner's results: tables and curves."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from scripts.output import markdown_table, new_figure

__all__ = [
    "curves",
    "folds_table",
    "intervals_over_folds",
    "means_of_folds",
    "means_of_seeds",
    "ranges_from_seeds",
    "read_runs",
    "seeds_table",
]

Runs = Mapping[str, Sequence[Mapping[str, Any]]]
"""By arm its runs, see :py:func:`read_runs`."""


def read_runs(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """
    Args:
        folder: where :py:mod:`scripts.experiments` has written its results.

    Returns:
        what the JSON file of each run holds; nothing for other folders.
    """
    contents = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))]
    return [content for content in contents if "arm" in content]


def means_of_folds(runs: Runs) -> dict[str, dict[int, float]]:
    """
    Args:
        runs: by arm.

    Returns:
        by arm and fold the mean Dice of the cases.
    """
    return {arm: _means(mine, "fold") for arm, mine in runs.items()}


def means_of_seeds(runs: Runs) -> dict[str, list[float]]:
    """
    Args:
        runs: by arm.

    Returns:
        by arm the mean Dice of the cases for each seed that is done on all folds that there are, as folds differ more
        than seeds do.
    """
    folds = {run["fold"] for mine in runs.values() for run in mine}
    means = {}
    for arm, mine in runs.items():
        done = {seed for seed in {r["seed"] for r in mine} if {r["fold"] for r in mine if r["seed"] == seed} == folds}
        means[arm] = list(_means([run for run in mine if run["seed"] in done], "seed").values())
    return means


def ranges_from_seeds(means: Mapping[str, Sequence[float]], reference: str) -> dict[str, tuple[float, float]]:
    """
    Args:
        means: see :py:func:`means_of_seeds`.
        reference: an arm.

    Returns:
        by arm the difference to the reference, and half the 95 % range that seeds alone give it: by Student's t, from
        the standard deviation pooled over the arms. Nothing where no arm has several seeds.
    """
    freedom = sum(max(0, len(values) - 1) for values in means.values())
    if not freedom or not means[reference]:
        return {}
    squares = sum(float(np.sum((np.array(values) - np.mean(values)) ** 2)) for values in means.values() if values)
    bound = float(student_t.ppf(0.975, freedom)) * (squares / freedom) ** 0.5
    return {
        arm: (
            float(np.mean(values) - np.mean(means[reference])),
            bound * (1 / len(values) + 1 / len(means[reference])) ** 0.5,
        )
        for arm, values in means.items()
        if arm != reference and values
    }


def intervals_over_folds(means: Mapping[str, Mapping[int, float]], reference: str) -> dict[str, tuple[float, float]]:
    """
    Args:
        means: of two folds or more, see :py:func:`means_of_folds`.
        reference: an arm.

    Returns:
        by arm the mean of the folds' differences to the reference, and half its 95 % interval over the folds: by
        Student's t, with the variance corrected for training sets that overlap (Nadeau and Bengio, Machine Learning 52,
        2003).
    """
    folds = list(means[reference])
    found = {}
    for arm, values in means.items():
        if arm != reference:
            differences = [values[fold] - means[reference][fold] for fold in folds]
            # Of a cross-validation that is not complete the correction is too large rather than too small.
            error = float(np.std(differences, ddof=1)) * (1 / len(folds) + 1 / (len(folds) - 1)) ** 0.5
            found[arm] = float(np.mean(differences)), float(student_t.ppf(0.975, len(folds) - 1)) * error
    return found


def seeds_table(
    means: Mapping[str, Sequence[float]], folds: int, from_seeds: Mapping[str, tuple[float, float]], reference: str
) -> str:
    """
    Args:
        means: see :py:func:`means_of_seeds`.
        folds: how many they are of.
        from_seeds: see :py:func:`ranges_from_seeds`.
        reference: what those differ from.

    Returns:
        a Markdown table with a line for each arm.
    """
    head = ["", "folds", "seeds", "mean Dice of each seed", "their standard deviation"]
    head += [f"difference to {reference} ± 95 % range from seeds alone"] if from_seeds else []
    lines = []
    for arm, values in means.items():
        spread = f"{np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
        cells = [arm, str(folds), str(len(values)), ", ".join(f"{value:.4f}" for value in values), spread]
        if from_seeds:
            cells.append("{:+.4f} ± {:.4f}".format(*from_seeds[arm]) if arm in from_seeds else "")
        lines.append(cells)
    return markdown_table(head, lines) + "\n"


def folds_table(
    means: Mapping[str, Mapping[int, float]], over_folds: Mapping[str, tuple[float, float]], reference: str
) -> str:
    """
    Args:
        means: see :py:func:`means_of_folds`.
        over_folds: see :py:func:`intervals_over_folds`.
        reference: what those differ from.

    Returns:
        a Markdown table with a line for each arm.
    """
    folds = list(means[reference])
    head = ["mean Dice", *(f"fold {fold}" for fold in folds), f"difference to {reference} [95 % CI over folds]"]
    lines = []
    for arm, values in means.items():
        mean, half = over_folds.get(arm, (0.0, 0.0))
        interval = f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]" if arm != reference else ""
        lines.append([arm, *(f"{values[fold]:.4f}" for fold in folds), interval])
    return markdown_table(head, lines) + "\n"


def curves(runs: Runs) -> Any:
    """
    Args:
        runs: by arm.

    Returns:
        a figure: validation's mean Dice by epoch, means of each arm's runs; None where nothing was validated.
    """
    figure, axes = new_figure(1, 1)
    for k, (arm, mine) in enumerate(runs.items()):
        by_epoch: dict[int, list[float]] = {}
        for row in (row for run in mine for row in run["curve"] if row["val_mean_dice"]):
            by_epoch.setdefault(int(row["epoch"]), []).append(float(row["val_mean_dice"]))
        if not by_epoch:  # it evaluates the weights of another
            continue
        epochs = sorted(by_epoch)
        style = ("-", "--", ":", "-.")[k // 10 % 4]
        axes[0][0].plot(epochs, [np.mean(by_epoch[e]) for e in epochs], style, marker="o", markersize=3, label=arm)
    if not axes[0][0].lines:
        return None
    axes[0][0].set(xlabel="epoch", ylabel="validation's mean Dice, mean of the runs")
    axes[0][0].grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    return figure


def _means(runs: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    """Mean Dice of the cases by "seed" or "fold"."""
    found: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        found[run[key]].extend(case["val_mean_dice"]["mean"] for case in run["cases"].values())
    return {k: float(np.mean(values)) for k, values in sorted(found.items())}
