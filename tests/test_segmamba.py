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
from scripts.segmamba import SegMamba
from scripts.tri_orientated_mamba import ToM

SMALL = {"channels": (8, 16), "depths": (1, 2), "hidden_size": 24}


def make(**options) -> SegMamba:
    torch.manual_seed(0)
    return SegMamba(**{**SMALL, **options})


@pytest.mark.parametrize("size", [(8, 8, 8), (9, 11, 6), (4, 4, 4), (3, 5, 13)], ids=str)
def test_any_size_within_any_size_and_a_gradient_for_every_parameter(size):
    network = AnySize(make(in_channels=2, out_channels=3), 4)
    y = network(torch.randn(2, 2, *size))
    assert y.shape == (2, 3, *size)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_every_mamba_layer_is_a_tom_with_a_residual():
    toms = [module for module in make().modules() if isinstance(module, ToM)]
    assert [tom.norm.normalized_shape[0] for tom in toms] == [8, 16, 16]
    assert all(tom.residual and tom.orders == ("forward", "reverse", "inter_slice") for tom in toms)


def test_engines_agree():
    network, x = make(scan_engine="reference"), torch.randn(1, 1, 8, 12, 8)
    expected = network(x)
    for module in network.modules():
        if isinstance(module, ToM):
            module.scan_engine = "auto"
    torch.testing.assert_close(network(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "text"), [({"spatial_dims": 2}, "spatial_dims must be 3"), ({"depths": (1,)}, "got 2 and 1")]
)
def test_errors(options, text):
    with pytest.raises(ValueError, match=text):
        make(**options)
