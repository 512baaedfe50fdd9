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
from pathlib import Path
from typing import Any

from scripts.output import new_figure, save_figure

from .papers import load_papers

__all__ = ["plots"]


def plots(
    results_dir: str = "",
    setup: str = "BTCV",
    metric: str = "val_mean_dice",
    training_steps: int = 1,
    papers: bool = False,
    output_dir: str = "",
) -> None:
    """
    Dice against training memory and against CO2-equivalent of training, as SegResMamba's Figures 2 and 3.

    Args:
        results_dir: folder with what ``efficiency`` wrote (one efficiency-*.json), and for each network a folder of its
            overlay's name with the summary.json of its evaluation.
        setup: set-up of the efficiency's results (or of the papers) whose memory and emissions are taken.
        metric: in summary.json, of which the mean over classes is taken.
        training_steps: that a training took; the CO2-equivalent of one is multiplied by it.
        papers: draw the papers' own figures instead.
        output_dir: where dice_against_memory-*.png and dice_against_co2-*.png are written; default: ``results_dir``.

    Raises:
        FileNotFoundError: when there is nothing to draw in the folder.
        ValueError: when the set-up is unknown, or no folder is given.
    """
    if papers:
        known = load_papers()
        if setup not in known:
            raise ValueError(f"the papers have no set-up {setup!r}; they have: {', '.join(known)}.")
        points = [{"network": network, **figures} for network, figures in known[setup].items()]
        title, unit, kind = f"{setup}, the papers' own figures", "kg", "papers"
    else:
        points = _collect(results_dir, setup, metric, training_steps)
        title, unit, kind = setup, "g", "measured"
    folder = Path(output_dir or results_dir)
    if not str(output_dir or results_dir):
        raise ValueError("give --output_dir, where the pictures go.")
    trained = "a training step" if training_steps == 1 and not papers else "training"
    labels = {"memory": "peak memory of a training step, GB", "co2": f"CO2-equivalent of {trained}, {unit}"}
    for key, label in labels.items():
        found = [p for p in points if key in p and "dice" in p]
        if found:
            path = folder / f"dice_against_{key}-{setup.lower()}-{kind}.png"
            _draw(found, key, label, title, path)
            print(f"written: {path}")
        else:
            print(f"{title}: no network has both Dice and {key}.")


def _collect(results_dir: str, setup: str, metric: str, training_steps: int) -> list[dict[str, Any]]:
    folder = Path(results_dir)
    files = sorted(folder.glob("efficiency-*.json")) if results_dir else []
    if len(files) != 1:
        raise FileNotFoundError(f"{folder}: there must be one efficiency-*.json, found {len(files)}.")
    rows = [row for row in json.loads(files[0].read_text())["rows"] if row["setup"] == setup]
    if not rows:
        raise ValueError(f"{files[0]}: there is no set-up {setup!r}.")
    points = []
    for row in rows:
        summary = folder / row["network"] / "summary.json"
        training = row.get("training", {})
        if summary.is_file() and "median" in training:
            dice = json.loads(summary.read_text())[metric]["mean"]["mean"]
            points.append({"network": row["network"], "dice": dice, "memory": training["memory_mib"] * 2**20 / 1e9})
            points[-1]["co2"] = training["co2_g"] * training_steps
    if not points:
        raise FileNotFoundError(f"{folder}: there is no <network>/summary.json of a network timed in {files[0].name}.")
    return points


def _draw(points: list[dict[str, Any]], key: str, label: str, title: str, path: Path) -> None:
    figure, axes = new_figure(1, 1)
    axis = axes[0][0]
    for k, point in enumerate(sorted(points, key=lambda p: p["network"])):
        own = point["network"].startswith("segresmamba")
        marker, size = ("*", 160) if own else ("osD^vPXh"[k % 8], 60)
        axis.scatter(point[key], point["dice"], s=size, marker=marker, alpha=0.8, label=point["network"], zorder=2)
    axis.set(xlabel=label, ylabel="mean Dice", title=title)
    axis.set_xlim(0, 1.1 * max(point[key] for point in points))
    axis.margins(y=0.15)
    axis.grid(alpha=0.3, zorder=0)
    figure.legend(loc="outside right upper")
    save_figure(figure, path)
