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

import pytest
import torch

from scripts.any_size import AnySize


class Recorder(torch.nn.Module):
    """Keeps what it was given and returns it in two channels."""

    def forward(self, x):
        self.seen = x
        return torch.cat([x, -x], 1)


@pytest.mark.parametrize(
    ("size", "multiple", "least", "padded"),
    [
        ((8, 16, 32), 8, 0, (8, 16, 32)),
        ((7, 9, 17), 8, 0, (8, 16, 24)),
        ((7, 40, 64), 32, 64, (64, 64, 64)),
        ((5, 3, 1), 1, 0, (5, 3, 1)),
    ],
)
def test_padded_behind_and_cut_back(size, multiple, least, padded):
    network, x = Recorder(), torch.rand(2, 1, *size)
    y = AnySize(network, multiple, least)(x)
    assert torch.equal(y, torch.cat([x, -x], 1))
    assert network.seen.shape == (2, 1, *padded)
    d, h, w = size
    assert torch.equal(network.seen[:, :, :d, :h, :w], x) and network.seen.count_nonzero() == x.count_nonzero()


def test_multiple_is_checked():
    with pytest.raises(ValueError, match="multiple must be at least 1"):
        AnySize(torch.nn.Identity(), 0)
