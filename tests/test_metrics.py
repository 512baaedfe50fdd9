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

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts.evaluation import statistics
from scripts.metrics import HausdorffDistance, MetricInMM, SurfaceDice, VolumeError

AFFINE = torch.diag(torch.tensor([1.0, 1.5, 2.5, 1.0]))


def measure(metric, prediction: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """The values of one case, by class."""
    handler = MetricInMM(metric)
    handler.update(([prediction], [MetaTensor(reference, affine=AFFINE)]))
    return handler.metric_fn.get_buffer()[0].tolist()


@pytest.fixture
def cube():
    """One-hot of background and a cube of 4 x 4 x 4 voxels, in a volume of 16 x 16 x 16."""
    labels = torch.zeros(2, 16, 16, 16)
    labels[1, 4:8, 4:8, 4:8] = 1
    labels[0] = 1 - labels[1]
    return labels


def test_a_shift_in_mm(cube):
    shifted = cube.roll(2, dims=3)  # two voxels of 2.5 mm along the last axis
    assert measure(HausdorffDistance(percentile=95), shifted, cube) == pytest.approx([5.0])
    assert measure(SurfaceDice(tolerance=5.0), shifted, cube) == [1.0]
    shared = measure(SurfaceDice(tolerance=0.0), shifted, cube)[0]
    assert 0 < shared < measure(SurfaceDice(tolerance=2.5), shifted, cube)[0] < 1
    assert measure(VolumeError(), shifted, cube) == [0.0]


def test_volume_error_is_in_millilitres_with_its_sign(cube):
    larger = cube.clone()
    larger[1, 4:8, 4:8, 8:10] = 1  # 32 voxels of 3.75 mm^3
    assert measure(VolumeError(), larger, cube) == pytest.approx([0.12])
    assert measure(VolumeError(), cube, larger) == pytest.approx([-0.12])
    assert measure(VolumeError(include_background=True), larger, cube) == pytest.approx([0.0, 0.12])
    metric = VolumeError()
    metric([larger, cube], [cube, cube], spacing=(1.0, 1.5, 2.5))
    assert metric.aggregate().item() == pytest.approx(0.06)


DIAGONAL = float(np.linalg.norm([16, 24, 40]))


@pytest.mark.parametrize(
    ("metric", "both", "one"),
    [
        (HausdorffDistance(percentile=95), 0.0, DIAGONAL),
        (SurfaceDice(tolerance=1.0), 1.0, 0.0),
        (SurfaceDice(tolerance=[1.0]), 1.0, 0.0),
    ],
)
@pytest.mark.filterwarnings("ignore:the (ground truth|prediction)")
def test_empty_references_and_predictions_have_values(metric, both, one, cube):
    empty = torch.zeros_like(cube)
    empty[0] = 1
    assert measure(metric, empty, empty) == pytest.approx([both])
    assert measure(metric, cube, empty) == pytest.approx([one])
    assert measure(metric, empty, cube) == pytest.approx([one])


def test_empty_regions_beside_others(cube):
    """Regions have no background channel, and one that is empty changes nothing in the others."""
    regions = torch.cat([cube[1:], torch.zeros_like(cube[1:]), cube[1:]])
    values = measure(SurfaceDice(tolerance=1.0, include_background=True), regions, regions)
    assert values == [1.0, 1.0, 1.0]
    found = measure(HausdorffDistance(include_background=True), regions, regions[[1, 0, 2]])
    assert found == pytest.approx([DIAGONAL, DIAGONAL, 0.0])


def test_statistics():
    values = np.random.default_rng(1).normal(0.8, 0.1, 200)
    found = statistics(values)
    assert found["mean"] == pytest.approx(values.mean()) and found["std"] == pytest.approx(values.std(ddof=1))
    half = 1.96 * values.std(ddof=1) / 200**0.5  # of the normal distribution's interval
    assert found["ci95_high"] - found["mean"] == pytest.approx(half, rel=0.1)
    assert found["mean"] - found["ci95_low"] == pytest.approx(half, rel=0.1)
    assert statistics(values) == found
    assert statistics(np.array([0.5])) == {"mean": 0.5, "std": 0, "median": 0.5, "ci95_low": 0.5, "ci95_high": 0.5}
    assert statistics(np.ones(5))["ci95_low"] == 1.0
