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

"""What an evaluation writes: values of each case and class, and a summary with confidence intervals."""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine
from monai.handlers import MetricsSaver
from monai.handlers.utils import write_metrics_reports
from monai.utils import string_list_all_gather
from scipy.stats import bootstrap

from scripts.output import write_text

__all__ = ["ClassMetricsSaver", "read_cases", "statistics", "summary_table"]


def _image_meta(batch: Sequence[Any]) -> list[dict]:
    return [item["image"].meta for item in batch]


class ClassMetricsSaver(MetricsSaver):
    """
    MONAI's ``MetricsSaver`` with the classes' names as columns, which also writes and logs a summary.

    Files in ``save_dir``: metrics.csv (overall values), for each metric ``{metric}_raw.csv`` (a row per case, a column
    per class) and ``{metric}_summary.csv``, and summary.json: the number of cases, and per metric and class the
    :py:func:`statistics` of the cases; "mean" is the mean of a case's classes. The metrics must have a value for each
    case and class, see :py:mod:`scripts.metrics`.

    Args:
        save_dir: folder to write to.
        class_names: names of the classes that the metrics hold, thus without the background where they leave it out.
        metric_details: names of the metrics.
        batch_transform: takes the metadata of the images from the engine's batch.
        summary_ops: columns of the summaries, see MONAI's class.
    """

    def __init__(
        self,
        save_dir: str,
        class_names: Sequence[str],
        metric_details: str | Sequence[str] = "*",
        batch_transform: Callable = _image_meta,
        summary_ops: str | Sequence[str] = ("mean", "std", "median", "min", "max", "notnans"),
    ) -> None:
        super().__init__(
            save_dir, metric_details=metric_details, batch_transform=batch_transform, summary_ops=summary_ops
        )
        self.class_names = [_unquoted(name) for name in class_names]
        self.logger = logging.getLogger(__name__)

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: the evaluator.
        """
        super().attach(engine)
        self.logger = engine.logger

    def __call__(self, engine: Engine) -> None:
        """
        Args:
            engine: the evaluator.
        """
        cases = string_list_all_gather(self._filenames) if idist.get_world_size() > 1 else self._filenames
        cases = [_unquoted(case) for case in cases]
        if idist.get_rank() != self.save_rank:
            return
        details = {
            name: torch.as_tensor(values).cpu().double()
            for name, values in engine.state.metric_details.items()
            if name in self.metric_details or "*" in self.metric_details
        }
        write_metrics_reports(
            save_dir=self.save_dir,
            images=cases,
            metrics={name: value for name, value in engine.state.metrics.items() if name in details},
            metric_details=details,
            summary_ops=self.summary_ops,
            class_labels=self.class_names,
        )
        summary: dict[str, Any] = {"cases": len(cases)}
        for name, values in details.items():
            columns = {label: values[:, k].numpy() for k, label in enumerate(self.class_names)}
            columns["mean"] = values.mean(1).numpy()
            summary[name] = {label: statistics(column) for label, column in columns.items()}
        path = os.path.join(self.save_dir, "summary.json")
        write_text(path, json.dumps(summary, indent=4) + "\n")
        self.logger.info(
            f"{len(cases)} cases, mean +- standard deviation:\n{summary_table(summary)}\nWritten to {path}."
        )


def _unquoted(name: str) -> str:
    """For MONAI's CSV files, which put nothing in quotes."""
    return name.replace(",", " ")


def read_cases(folder: str | os.PathLike) -> dict[str, dict[str, dict[str, float]]]:
    """
    Args:
        folder: that an evaluation has written to.

    Returns:
        the values by case (file name of the image), metric and class; "mean" among the classes is the mean of them.
    """
    cases: dict[str, dict[str, dict[str, float]]] = {}
    for file in sorted(Path(folder).glob("*_raw.csv")):
        with open(file, newline="", encoding="utf-8") as table:
            for row in csv.DictReader(table):
                case = cases.setdefault(os.path.basename(row.pop("filename")), {})
                case[file.name.removesuffix("_raw.csv")] = {label: float(value) for label, value in row.items()}
    return cases


def summary_table(summary: Mapping[str, Any]) -> str:
    """
    Args:
        summary: content of summary.json.

    Returns:
        lines of a table, a row per class and a column per metric, mean and standard deviation.
    """
    metrics = [name for name in summary if name != "cases"]
    rows = [["class", *metrics]]
    for label in summary[metrics[0]]:
        found = [summary[name][label] for name in metrics]
        rows.append([label, *(f"{values['mean']:.4f} +- {values['std']:.4f}" for values in found)])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows)


def statistics(values: np.ndarray) -> dict[str, float]:
    """
    Args:
        values: of one metric, one for each case; at least one.

    Returns:
        "mean", "std" (of the sample, 0 for a single case), "median", and "ci95_low" and "ci95_high", the 95 %
        confidence interval of the mean from 9,999 bootstrap samples (percentiles), always of the same seed.
    """
    found = {"mean": np.mean(values), "std": 0.0, "median": np.median(values)}
    found["ci95_low"] = found["ci95_high"] = found["mean"]
    if len(values) > 1:
        found["std"] = np.std(values, ddof=1)
        generator = np.random.default_rng(0)
        interval = bootstrap((values,), np.mean, method="percentile", random_state=generator).confidence_interval
        found["ci95_low"], found["ci95_high"] = interval
    return {name: float(value) for name, value in found.items()}
