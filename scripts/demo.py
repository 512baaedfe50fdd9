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

"""Dice of label maps against the labels of the test cases, as a table, and where the pictures are.

Usage::

    python -m scripts.demo --dataset_dir demo/phantom --prediction_dir demo/inference --picture_dir demo
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from monai.metrics import DiceMetric
from monai.transforms import LoadImage

from scripts.datalist import dataset_classes, load_datalist

__all__ = ["dice_of_test_cases", "dice_table"]


def dice_of_test_cases(
    dataset_dir: str | os.PathLike, prediction_dir: str | os.PathLike, postfix: str = "seg"
) -> tuple[list[str], torch.Tensor]:
    """
    Compare written label maps with the test cases' labels, voxel by voxel on the images' own grids.

    Args:
        dataset_dir: data set in the Decathlon's layout with ``labelsTs``.
        prediction_dir: folder of the label maps, ``{case}_{postfix}.nii.gz``.
        postfix: what follows the case's name in theirs.

    Returns:
        The names of the test cases, and MONAI's Dice (cases, classes without the background), NaN where a class is in
        no voxel of the label.

    Raises:
        FileNotFoundError: When a label or a label map is missing.
        ValueError: When a label map lies on another grid than its label.
    """
    loader = LoadImage(ensure_channel_first=True)
    num_classes = len(dataset_classes(dataset_dir))
    metric = DiceMetric(include_background=False, num_classes=num_classes)
    names = []
    for item in load_datalist(dataset_dir, "test"):
        image = item["image"] if isinstance(item["image"], str) else item["image"][0]
        name = os.path.basename(image).removesuffix(".gz").removesuffix(".nii")
        if "label" not in item:
            raise FileNotFoundError(f"{name} has no label in labelsTs.")
        path = Path(prediction_dir) / f"{name}_{postfix}.nii.gz"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: run the inference first.")
        prediction, label = loader(path), loader(item["label"])
        if prediction.shape != label.shape or not torch.allclose(prediction.affine, label.affine, atol=1e-3):
            raise ValueError(f"{path} lies on another grid than {item['label']}.")
        metric(prediction[None], label[None])
        names.append(name)
    return names, metric.aggregate("none")


def dice_table(cases: Sequence[str], classes: Sequence[str], dice: torch.Tensor) -> str:
    """
    Lines of a table, a row per case and a column per class, with means over what is not NaN.

    Args:
        cases: names of the rows.
        classes: names of the columns.
        dice: values (cases, classes).
    """
    values = torch.cat([dice, dice.nanmean(1, keepdim=True)], 1)
    values = torch.cat([values, values.nanmean(0, keepdim=True)])
    rows = [["case", *classes, "mean"]]
    for name, line in zip([*cases, "mean"], values.tolist()):
        rows.append([name, *(f"{value:.3f}" for value in line)])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(w) if k else cell.ljust(w) for k, (cell, w) in enumerate(zip(row, widths))) for row in rows
    )


def _main(dataset_dir: str, prediction_dir: str, picture_dir: str | None = None) -> None:
    """Print the Dice of label maps on the test cases of a data set, and the paths of pictures.

    Args:
        dataset_dir: data set in the Decathlon's layout with labelsTs.
        prediction_dir: folder of the label maps.
        picture_dir: folder to look for pictures in, with what is below it.
    """
    try:
        classes = list(dataset_classes(dataset_dir).values())[1:]
        cases, dice = dice_of_test_cases(dataset_dir, prediction_dir)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"Error: {error}") from error
    print(f"\nDice on {len(cases)} test cases, which neither training nor validation has seen:\n")
    print(dice_table(cases, classes, dice))
    if picture_dir is not None:
        print("\nPictures:")
        for path in sorted(Path(picture_dir).rglob("*.png")):
            print(f"  {path}")


if __name__ == "__main__":
    from scripts.clear_errors import command

    command(_main)
