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
"""Files that are there whole or not at all, figures that need no display, and tables."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from monai.data import MetaTensor
from monai.data.folder_layout import default_name_formatter

__all__ = [
    "IMAGE_SUFFIXES",
    "case_name",
    "markdown_table",
    "new_figure",
    "save_as_case",
    "save_figure",
    "whole_file",
    "without_channels",
    "write_text",
]

IMAGE_SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")
"""Of volumes, each in a file of its own."""


def case_name(image: str | os.PathLike) -> str:
    """
    Args:
        image: a volume's file, or the folder of a DICOM series.

    Returns:
        what files that belong to it are named after: its name without the suffix of a volume. Nothing else is cut off,
        as folders of series are often named after identifiers with dots.
    """
    name = os.path.basename(os.path.normpath(image))
    return next((name[: -len(suffix)] for suffix in IMAGE_SUFFIXES if name.lower().endswith(suffix)), name)


def save_as_case(metadata: Mapping[str, Any], saver: Any) -> dict[str, Any]:
    """
    The ``output_name_formatter`` of MONAI's SaveImage that goes by :py:func:`case_name`; MONAI's own cuts off whatever
    stands behind the last dot.

    Args:
        metadata: of the image.
        saver: the transform.

    Returns:
        the arguments of the folder layout's ``filename``.
    """
    names = default_name_formatter(metadata, saver)
    return {**names, "subject": case_name(names["subject"]) + ".nii"}


def without_channels(labels: MetaTensor) -> MetaTensor:
    """
    Say in a label map's metadata, which are its image's, that its file has no channels. Of an image that has some MONAI
    1.6.1 takes the last axis of the label map for them while it writes, and fails where slices lie along another one.

    Args:
        labels: of one channel (1, D, H, W); its metadata are changed in place.

    Returns:
        the same.
    """
    labels.meta["original_channel_dim"] = "no_channel"
    return labels


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """
    Args:
        head: of the columns.
        lines: their cells.

    Returns:
        a table in Markdown, whose last line has no end.
    """
    rows = [f"| {' | '.join(cells)} |" for cells in (head, *lines)]
    return "\n".join([rows[0], f"|{' --- |' * len(head)}", *rows[1:]])


def new_figure(rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    """
    Args:
        rows: of axes.
        columns: of axes.

    Returns:
        a figure, unknown to pyplot, and its axes, as a list of rows.
    """
    figure = Figure(figsize=(6.5 * columns, 4.5 * rows), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """
    Write a PNG under another name and move it to its place.

    Args:
        figure: what to write, at its own resolution and in its own colours.
        path: where it goes; missing folders are made.
    """
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, format="png", facecolor=figure.get_facecolor())


def write_text(path: str | os.PathLike, text: str) -> None:
    """
    Write a text under another name and move it to its place.

    Args:
        path: where it goes; missing folders are made.
        text: what to write, in UTF-8.
    """
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """
    Args:
        path: where a file goes; missing folders are made.

    Yields:
        where to write it; moved to its place at the end, removed if something was raised.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
