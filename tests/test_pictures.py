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

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from matplotlib.image import imread
from monai.data import MetaTensor
from monai.transforms import LoadImage

from scripts.phantom_volume import PHANTOM_CLASSES, make_phantom
from scripts.pictures import OverlayPictures, draw_overlay


def texts(figure) -> str:
    found = [text.get_text() for text in figure.texts]
    found += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return " | ".join(found)


@pytest.fixture(scope="module")
def phantom():
    image, label, affine = make_phantom(
        2, orientation="RAS", oblique=False, spatial_size=(40, 36, 30), spacing=(4, 4, 5)
    )
    return image, label, affine


def test_reference_beside_prediction(phantom):
    image, label, _ = phantom
    figure = draw_overlay(image, np.roll(label, 1, 0), label, (4, 4, 5), PHANTOM_CLASSES, "case 7")
    shown = texts(figure)
    assert len(figure.axes) == 6
    assert "case 7" in shown and "Reference" in shown and "Prediction" in shown
    same = (np.roll(label, 1, 0) == 1) & (label == 1)
    assert f"liver-like  Dice {same.sum() / (label == 1).sum():.3f}" in shown


def test_prediction_alone(phantom):
    image, label, _ = phantom
    figure = draw_overlay(image, label, class_names=PHANTOM_CLASSES[:2])
    shown = texts(figure)
    assert len(figure.axes) == 3
    assert "Reference" not in shown and "Dice" not in shown
    assert "liver-like" in shown and "class 2" in shown  # a class without a name


def test_planes_keep_the_spacing_and_the_sides(phantom):
    image, label, _ = phantom
    axial, coronal, sagittal = draw_overlay(image, label, spacing=(4, 4, 5)).axes
    for axes, width, height in ((axial, 160, 144), (coronal, 160, 150), (sagittal, 144, 150)):
        assert axes.get_xlim() == (width, 0)  # right and anterior at the left
        assert axes.get_ylim() == (0, height)
        box = axes.get_position().bounds
        inches = axes.figure.get_size_inches()
        assert box[2] * inches[0] / (box[3] * inches[1]) == pytest.approx(width / height)


@pytest.mark.parametrize("kind", ["no foreground", "constant", "not finite", "many classes"])
def test_odd_volumes_are_drawn(kind):
    image = np.random.RandomState(0).rand(20, 22, 24)
    label = np.zeros(image.shape, np.uint8)
    if kind == "constant":
        image[:] = 3
        label[5:9, 5:9, 5:9] = 1
    elif kind == "not finite":
        image[:3] = np.nan
        image[4] = np.inf
        label[2:9, 5:9, 5:9] = 1
    elif kind == "many classes":
        label[:] = np.arange(20)[:, None, None]
    figure = draw_overlay(image, label, label)
    figure.canvas.draw()
    assert ("no foreground" in texts(figure)) == (kind == "no foreground")


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="share one shape"):
        draw_overlay(np.zeros((8, 8, 8)), np.zeros((8, 8, 9)))


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR"])
def test_handler_turns_every_orientation_alike(orientation, tmp_path, monkeypatch):
    image, label, affine = make_phantom(
        4, orientation="RAS", oblique=False, spatial_size=(30, 28, 26), spacing=(5, 5, 6)
    )
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(affine), nib.orientations.axcodes2ornt(tuple(orientation))
    )
    turned = [nib.Nifti1Image(array, affine).as_reoriented(turn) for array in (image, label)]
    nib.save(turned[0], tmp_path / "case.nii.gz")
    volume = LoadImage(ensure_channel_first=True)(tmp_path / "case.nii.gz")
    values = torch.as_tensor(np.ascontiguousarray(turned[1].dataobj))
    one_hot = MetaTensor(torch.nn.functional.one_hot(values.long(), 5).movedim(-1, 0).float())

    seen = {}

    def spy(image, prediction, reference, spacing, names, title):
        seen.update(image=image, prediction=prediction, reference=reference, spacing=spacing, title=title)
        return draw_overlay(image, prediction, reference, spacing, names, title)

    monkeypatch.setattr("scripts.pictures.draw_overlay", spy)
    engine = Engine(lambda engine, batch: None)
    engine.state.batch = [{"image": volume}]
    engine.state.output = [{"image": volume, "pred": one_hot, "label": MetaTensor(values[None].float())}]
    OverlayPictures(str(tmp_path / "out"), PHANTOM_CLASSES)(engine)

    assert np.array_equal(seen["prediction"], label) and np.array_equal(seen["reference"], label)
    assert np.array_equal(seen["image"], image)
    assert seen["spacing"] == pytest.approx([5, 5, 6]) and seen["title"] == "case"
    picture = imread(tmp_path / "out" / "case_overlay.png")
    assert min(picture.shape[:2]) > 400
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["case_overlay.png"]
