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
import io
from pathlib import Path

import numpy as np
from ignite.engine import Engine, Events
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from monai.engines import Evaluator

from scripts.output import save_figure, write_text

__all__ = ["TrainingCurve"]


class TrainingCurve:
    """
    Handler of a trainer that keeps the course of a training: a row per epoch in training_curve.csv and, after each
    validation, training_curve.png with the loss and the validation's metric. A resumed training goes on with both.

    Attach it behind the handler that validates and the one that resumes.

    Args:
        output_dir: folder to write to.
        validator: the evaluator that validates during the training.
        loss_name: name of the mean loss in the trainer's metrics.
        metric_name: name of the metric in the evaluator's metrics.
    """

    def __init__(
        self,
        output_dir: str,
        validator: Evaluator,
        loss_name: str = "train_mean_loss",
        metric_name: str = "val_mean_dice",
    ) -> None:
        self.output_dir = Path(output_dir)
        self.validator = validator
        self.loss_name = loss_name
        self.metric_name = metric_name
        self.rows: list[tuple[int, float, float | None]] = []

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: the trainer.
        """
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)

    def started(self, engine: Engine) -> None:
        """
        Take over the rows of the epochs that a resumed training has behind it.

        Args:
            engine: the trainer.
        """
        self.rows = []
        path = self.output_dir / "training_curve.csv"
        if engine.state.epoch > 0 and path.is_file():
            with open(path, newline="", encoding="utf-8") as file:
                for epoch, loss, metric in list(csv.reader(file))[1:]:
                    if int(epoch) <= engine.state.epoch:
                        self.rows.append((int(epoch), float(loss), float(metric) if metric else None))

    def epoch_completed(self, engine: Engine) -> None:
        """
        Args:
            engine: the trainer.
        """
        epoch = engine.state.epoch
        validated = self.validator.state.epoch == epoch and self.metric_name in self.validator.state.metrics
        metric = float(self.validator.state.metrics[self.metric_name]) if validated else None
        self.rows.append((epoch, float(engine.state.metrics[self.loss_name]), metric))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("epoch", self.loss_name, self.metric_name))
        writer.writerows((e, loss, "" if m is None else m) for e, loss, m in self.rows)
        write_text(self.output_dir / "training_curve.csv", text.getvalue())
        if validated:
            save_figure(self._draw(), self.output_dir / "training_curve.png")

    def _draw(self) -> Figure:
        """Loss above, metric below, over the epochs; the best validation is marked."""
        figure = Figure(figsize=(7.5, 6.0), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        upper, lower = figure.subplots(2, 1, sharex=True)
        epochs = [row[0] for row in self.rows]
        points = "o" if len(epochs) < 3 else None
        upper.plot(epochs, [row[1] for row in self.rows], color="#D55E00", marker=points, markersize=4)
        upper.set_ylabel("mean training loss")
        upper.set_title("Course of the training", loc="left", weight="bold")
        measured = [(row[0], row[2]) for row in self.rows if row[2] is not None]
        lower.plot(*zip(*measured), color="#0072B2", marker="o", markersize=4, clip_on=False)
        best = max(measured, key=lambda pair: pair[1] if np.isfinite(pair[1]) else -np.inf)
        lower.plot(
            *best, marker="o", markersize=11, markerfacecolor="none", markeredgecolor="#0072B2", markeredgewidth=1.5
        )
        lower.set_title(
            f"best {best[1]:.3f} at epoch {best[0]}, last {measured[-1][1]:.3f} at epoch {measured[-1][0]}",
            loc="right",
            fontsize=10,
            color="#0072B2",
        )
        lower.set_ylabel("validation, mean Dice" if "dice" in self.metric_name else self.metric_name)
        lower.set_xlabel("epoch")
        if "dice" in self.metric_name:
            lower.set_ylim(0, 1)
        lower.xaxis.get_major_locator().set_params(integer=True)
        for axes in (upper, lower):
            axes.grid(color="#d5d8dc", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        return figure
