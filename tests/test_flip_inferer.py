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

import pytest
import torch
from monai.inferers import SimpleInferer, SlidingWindowInferer

from scripts.flip_inferer import FlipInferer


def test_mean_over_the_mirror_images():
    network = torch.nn.Conv3d(1, 2, 3, padding=1)
    volume = torch.rand(1, 1, 9, 8, 10)
    expected = network(volume)
    for flip in ([2], [4], [2, 4]):
        expected = expected + network(volume.flip(flip)).flip(flip)
    assert torch.allclose(FlipInferer(SimpleInferer(), [0, 2])(volume, network), expected / 4, atol=1e-6)
    assert torch.equal(FlipInferer(SimpleInferer())(volume, network), network(volume))


def test_a_symmetric_result_for_a_symmetric_volume():
    network = torch.nn.Conv3d(1, 2, 3, padding=1)
    half = torch.rand(1, 1, 8, 12, 9)
    volume = torch.cat([half, half.flip(2)], dim=2)
    output = FlipInferer(SlidingWindowInferer((8, 8, 8), overlap=0.5, mode="gaussian"), [0])(volume, network)
    assert torch.allclose(output, output.flip(2), atol=1e-5)


@pytest.mark.parametrize("axes", [[0, 0], [3], [-1]])
def test_other_axes_are_refused(axes):
    with pytest.raises(ValueError, match="flip_axes must be different axes"):
        FlipInferer(SimpleInferer(), axes)
