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

"""Pictures of a segmentation, and the handler that writes them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from ignite.engine import Engine, Events
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from monai.data import MetaTensor
from monai.transforms import LoadImage, Orientation

from scripts.output import case_name, save_figure

__all__ = ["OverlayPictures", "draw_overlay"]

# Okabe and Ito's colours, which the colour-blind can tell apart, brightest on grey first; then again, dashed
_COLORS = ("#E69F00", "#56B4E9", "#F0E442", "#CC79A7", "#009E73", "#D55E00", "#0072B2")
_STYLES = ("solid", "dashed", "dotted")
_DPI = 150
# Planes by the axis they cut, of a volume in RAS: name, axis along x and y of the picture, letters at left and right,
# top and bottom. Seen as radiologists do: the patient's right is at the picture's left.
_PLANES = (
    ("axial", 2, 0, 1, "RL", "AP"),
    ("coronal", 1, 0, 2, "RL", "SI"),
    ("sagittal", 0, 1, 2, "AP", "SI"),
)


def draw_overlay(
    image: np.ndarray,
    prediction: np.ndarray,
    reference: np.ndarray | None = None,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    class_names: Sequence[str] = (),
    title: str = "",
) -> Figure:
    """Draw three orthogonal planes through the centre of the foreground, with the labels' contours over the image.

    The plane cuts the reference's foreground, or the prediction's where there is no reference, at its centre of mass.

    Args:
        image: volume in RAS orientation, shape (X, Y, Z), any real dtype.
        prediction: label map of the same shape, whole numbers.
        reference: label map of the same shape, drawn in a row above the prediction; each class's Dice is then given.
        spacing: voxel size in mm along the three axes.
        class_names: names by label value, background first.
        title: text above the picture.

    Returns:
        A figure of its own, unknown to pyplot.

    Raises:
        ValueError: When the arrays differ in shape or are not of three dimensions.
    """
    maps = [("Prediction", prediction)] if reference is None else [("Reference", reference), ("Prediction", prediction)]
    if image.ndim != 3 or any(labels.shape != image.shape for _, labels in maps):
        raise ValueError(
            f"image and label maps must share one shape (X, Y, Z), got {image.shape} and "
            f"{', '.join(str(labels.shape) for _, labels in maps)}."
        )
    centre = _centre(reference, prediction)
    size = np.array(image.shape) * np.asarray(spacing, dtype=float)
    window = _window(image, (prediction if reference is None else reference) > 0)

    widths = [size[horizontal] for _, _, horizontal, *_ in _PLANES]
    height = max(size[vertical] for _, _, _, vertical, *_ in _PLANES)
    values = [int(v) for v in np.unique(np.concatenate([np.unique(labels) for _, labels in maps])) if v > 0]
    entries = _legend(values, prediction, reference, class_names)
    inch_per_mm = 9.0 / sum(widths)
    legend_rows = -(-len(entries) // 4)
    top, bottom, side, gap = 0.62, 0.22 + 0.24 * legend_rows, 0.42, 0.12  # inches
    row = height * inch_per_mm
    total = (9.0 + side + 2 * gap + 0.12, top + bottom + len(maps) * row + (len(maps) - 1) * gap)
    figure = Figure(figsize=total, dpi=_DPI, facecolor="#16181c")
    FigureCanvasAgg(figure)
    figure.text(side / total[0], 1 - 0.16 / total[1], title, color="white", fontsize=11, va="top", weight="bold")

    for line, (name, labels) in enumerate(maps):
        base = bottom + (len(maps) - 1 - line) * (row + gap)
        figure.text(
            0.2 / total[0],
            (base + row / 2) / total[1],
            name,
            color="white",
            fontsize=10,
            rotation=90,
            ha="center",
            va="center",
        )
        left = side
        for plane, width in zip(_PLANES, widths):
            tall = size[plane[3]] * inch_per_mm
            box = (left, base + (row - tall) / 2, width * inch_per_mm, tall)
            axes = figure.add_axes([box[0] / total[0], box[1] / total[1], box[2] / total[0], box[3] / total[1]])
            _draw_plane(axes, plane, image, labels, centre, spacing, window, values)
            if line == 0:
                centre_x = (left + width * inch_per_mm / 2) / total[0]
                figure.text(
                    centre_x, 1 - 0.56 / total[1], plane[0], color="#c8ccd2", fontsize=8.5, ha="center", va="bottom"
                )
            left += width * inch_per_mm + gap

    if entries:
        figure.legend(
            handles=entries,
            loc="lower center",
            ncols=min(4, len(entries)),
            frameon=False,
            fontsize=9,
            labelcolor="white",
            bbox_to_anchor=(0.5, 0.0),
            borderaxespad=0.3,
        )
    else:
        figure.text(0.5, 0.12 / total[1], "no foreground", color="white", fontsize=9, ha="center")
    return figure


class OverlayPictures:
    """
    Handler of an evaluator that writes, per case, a PNG of the label maps over the image (:py:func:`draw_overlay`).

    It takes the label maps as the engine's postprocessing leaves them, on the image's original grid, as label values,
    one-hot, or as regions that hold one another (one channel for each class but the background; the smallest is drawn
    on top), and reads the image afresh from its file: of an image of several channels, the first one.

    Args:
        output_dir: folder to write to; files are named like the image.
        class_names: names by label value, background first.
        rank_by: name of a metric with a value per case and class, larger is better; of the cases with the best, the
            median and the worst mean, the pictures also lie in best.png, median.png and worst.png. None for none.
        image_key: key of the image, whose metadata name the file.
        pred_key: key of the prediction in the engine's output.
        label_key: key of the reference in the engine's output, drawn where there is one.
        postfix: goes behind the image's name.
    """

    def __init__(
        self,
        output_dir: str,
        class_names: Sequence[str] = (),
        rank_by: str | None = None,
        image_key: str = "image",
        pred_key: str = "pred",
        label_key: str = "label",
        postfix: str = "overlay",
    ) -> None:
        self.output_dir = Path(output_dir)
        self.class_names = list(class_names)
        self.rank_by = rank_by
        self.image_key = image_key
        self.pred_key = pred_key
        self.label_key = label_key
        self.postfix = postfix
        self.logger = logging.getLogger(__name__)
        self._written: list[Path] = []
        self._loader = LoadImage(image_only=True, ensure_channel_first=True)
        self._to_ras = Orientation("RAS", labels=None)

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: the evaluator.
        """
        self.logger = engine.logger
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def started(self, engine: Engine) -> None:
        """
        Args:
            engine: the evaluator.
        """
        self._written = []

    def completed(self, engine: Engine) -> None:
        """
        Args:
            engine: the evaluator.
        """
        if self.rank_by is not None and self._written:
            order = torch.as_tensor(engine.state.metric_details[self.rank_by]).mean(1).argsort().tolist()
            for name, case in (("worst", order[0]), ("median", order[len(order) // 2]), ("best", order[-1])):
                shutil.copyfile(self._written[case], self.output_dir / f"{name}.png")
        self.logger.info(f"Wrote {len(self._written)} pictures to {self.output_dir}.")

    def __call__(self, engine: Engine) -> None:
        """
        Args:
            engine: the evaluator.
        """
        for item, output in zip(engine.state.batch, engine.state.output):
            file = str(item[self.image_key].meta["filename_or_obj"])
            image = self._loader(file)[:1]
            prediction = self._label_map(output[self.pred_key], image)
            reference = output.get(self.label_key)
            if reference is not None:
                reference = self._label_map(reference, image)
            image = self._to_ras(image)
            name = case_name(file)
            figure = draw_overlay(
                image[0].numpy(), prediction, reference, image.pixdim.tolist(), self.class_names, title=name
            )
            self._written.append(self.output_dir / f"{name}_{self.postfix}.png")
            save_figure(figure, self._written[-1])

    def _label_map(self, labels: torch.Tensor, image: MetaTensor) -> np.ndarray:
        """Label values in RAS orientation, shape (X, Y, Z), from label values or one-hot on the image's grid."""
        labels = labels.detach().cpu().as_subclass(torch.Tensor)
        if labels.shape[0] > 1 and labels.shape[0] == len(self.class_names) - 1:
            regions, labels = labels, torch.zeros_like(labels[:1])
            for k in regions.flatten(1).sum(1).argsort(descending=True).tolist():
                labels[regions[k : k + 1] > 0] = k + 1
        elif labels.shape[0] > 1:
            labels = labels.argmax(0, keepdim=True)
        return self._to_ras(MetaTensor(labels, affine=image.affine))[0].numpy().astype(np.int64)


def _draw_plane(
    axes: Axes,
    plane: tuple,
    image: np.ndarray,
    labels: np.ndarray,
    centre: Sequence[int],
    spacing: Sequence[float],
    window: tuple[float, float],
    values: Sequence[int],
) -> None:
    """Draw one plane of a volume with its contours, in millimetres, turned as radiologists see it."""
    _, cut, horizontal, vertical, sides, ends = plane
    grey = image.take(centre[cut], axis=cut).T.astype(np.float32)  # rows run along the vertical axis
    classes = labels.take(centre[cut], axis=cut).T
    width, height = image.shape[horizontal] * spacing[horizontal], image.shape[vertical] * spacing[vertical]
    axes.imshow(
        grey,
        cmap="gray",
        vmin=window[0],
        vmax=window[1],
        extent=(0, width, 0, height),
        origin="lower",
        interpolation="bilinear",
    )
    padded = np.pad(classes, 1)  # so that contours close at the border
    x = (np.arange(padded.shape[1]) - 0.5) * spacing[horizontal]
    y = (np.arange(padded.shape[0]) - 0.5) * spacing[vertical]
    for value in values:
        mask = padded == value
        if mask.any():
            color, style = _appearance(value)
            axes.contourf(x, y, mask.astype(np.float32), levels=[0.5, 1.5], colors=[color], alpha=0.18)
            axes.contour(
                x, y, mask.astype(np.float32), levels=[0.5], colors=[color], linestyles=[style], linewidths=1.4
            )
    axes.set_xlim(width, 0)
    axes.set_ylim(0, height)
    axes.set_axis_off()
    places = [(0.015, 0.5, sides[0], "left", "center"), (0.985, 0.5, sides[1], "right", "center")]
    places += [(0.5, 0.985, ends[0], "center", "top"), (0.5, 0.015, ends[1], "center", "bottom")]
    for across, up, letter, align, valign in places:
        text = axes.text(across, up, letter, transform=axes.transAxes, color="white", fontsize=8, ha=align, va=valign)
        text.set_path_effects([withStroke(linewidth=2, foreground="#16181c")])


def _centre(reference: np.ndarray | None, prediction: np.ndarray) -> list[int]:
    """Voxel at the foreground's centre of mass; the volume's centre where there is no foreground."""
    for labels in (reference, prediction):
        if labels is not None and (labels > 0).any():
            return [round(float(k.mean())) for k in np.nonzero(labels > 0)]
    return [n // 2 for n in prediction.shape]


def _window(image: np.ndarray, foreground: np.ndarray) -> tuple[float, float]:
    """Grey values to show as black and white: a margin about the foreground's, within the image's own range."""
    finite = image[np.isfinite(image)].astype(np.float64)
    low, high = np.percentile(finite, (0.5, 99.5)) if finite.size else (0.0, 1.0)
    inside = image[foreground & np.isfinite(image)]
    if inside.size:
        darkest, brightest = np.percentile(inside.astype(np.float64), (2, 98))
        margin = brightest - darkest
        low, high = max(low, darkest - 1.2 * margin), min(high, brightest + 0.8 * margin)
    return float(low), float(high) if high > low else float(low) + 1.0


def _legend(
    values: Sequence[int], prediction: np.ndarray, reference: np.ndarray | None, class_names: Sequence[str]
) -> list[Line2D]:
    """A line per class, with the Dice where there is a reference."""
    entries = []
    for value in values:
        label = class_names[value] if value < len(class_names) else f"class {value}"
        if reference is not None:
            both = np.count_nonzero(prediction == value) + np.count_nonzero(reference == value)
            label += f"  Dice {2 * np.count_nonzero((prediction == value) & (reference == value)) / both:.3f}"
        color, style = _appearance(value)
        entries.append(Line2D([], [], color=color, linestyle=style, linewidth=2.2, label=label))
    return entries


def _appearance(value: int) -> tuple[str, str]:
    """Colour and line style of a label value from 1."""
    cycle, index = divmod(value - 1, len(_COLORS))
    return _COLORS[index], _STYLES[cycle % len(_STYLES)]
