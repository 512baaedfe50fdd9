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

import copy

import pytest
import torch

from scripts.taming_mambas import VARIANTS, BidirectionalMambaLayer, MambaLayer, TamingMambas
from scripts.tri_orientated_mamba import ToM

SMALL = {"channels": (8, 16, 16), "kernel_size": ((1, 3, 3), 3, 3), "strides": (1, (1, 2, 2), 2)}
ALL = [None, *VARIANTS]


class TestLayers:
    def test_a_layer_goes_one_way(self):
        layer, x = MambaLayer(8, "dhw"), torch.randn(1, 8, 2, 3, 4)
        other = x.clone()
        other[0, :, 1, 0, 2] += torch.arange(8)
        changed = (layer(other) - layer(x)).abs().amax(1).flatten() > 0
        assert not changed[:14].any() and changed[14:].any()

    def test_a_bidirectional_layer_reaches_every_voxel(self):
        torch.manual_seed(0)
        layer, x = BidirectionalMambaLayer(8), torch.randn(1, 8, 2, 3, 4)
        other = x.clone()
        other[0, :, 1, 0, 2] += torch.arange(8)
        assert ((layer(other) - layer(x)).abs().amax(1) > 0).all()

    def test_its_second_layer_is_the_first_on_the_reversed_sequence(self):
        layer, x = BidirectionalMambaLayer(8), torch.randn(2, 8, 3, 4, 5)
        layer.backwards.load_state_dict(layer.forwards.state_dict())
        turned = layer.forwards(x.flip(2, 3, 4)).flip(2, 3, 4)
        torch.testing.assert_close(layer.backwards(x), turned)
        expected = layer.norm((layer.forwards(x) + turned).movedim(1, -1)).movedim(-1, 1)
        torch.testing.assert_close(layer(x), expected)

    def test_multi_is_the_mean_over_four_orders_of_the_axes(self):
        layer, x = TamingMambas(variant="MultiSegMamba", **SMALL).mamba[0], torch.randn(1, 8, 2, 3, 4)
        assert len(layer.layers) == 4
        total = 0
        for part, axes in zip(layer.layers, ("hwd", "hdw", "whd", "dwh")):
            plain = BidirectionalMambaLayer(8, "dhw", d_state=8)
            plain.load_state_dict(part.state_dict())
            permutation = [2 + "dhw".index(axis) for axis in axes]
            back = [0, 1, *(2 + axes.index(axis) for axis in "dhw")]
            total = total + plain(x.permute(0, 1, *permutation).contiguous()).permute(back)
        torch.testing.assert_close(layer(x), total / 4)


class TestNetwork:
    @pytest.mark.parametrize("variant", ALL)
    @pytest.mark.parametrize("size", [(8, 8, 8), (9, 11, 7), (3, 20, 13), (4, 4, 4)], ids=str)
    def test_any_size_and_a_gradient_for_every_parameter(self, variant, size):
        torch.manual_seed(0)
        network = TamingMambas(in_channels=2, out_channels=3, variant=variant, **SMALL)
        y = network(torch.randn(2, 2, *size))
        assert y.shape == (2, 3, *size)
        y.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
        if min(size) > 4:  # where the deepest level has several voxels, so that its norms pass something on
            assert all(p.grad.abs().sum() > 0 for p in network.parameters())

    def test_a_bottleneck_of_one_voxel(self):
        network = TamingMambas(channels=(8, 8), kernel_size=(3, 3), strides=(1, 2))
        assert network(torch.randn(1, 1, 2, 2, 2)).shape == (1, 2, 2, 2, 2)

    def test_deep_supervision(self):
        network = TamingMambas(deep_supervision=True, out_channels=3, **SMALL)
        logits = network(torch.randn(1, 1, 9, 12, 7))
        assert [tuple(y.shape) for y in logits] == [(1, 3, 9, 12, 7), (1, 3, 9, 6, 4)]
        sum(y.square().sum() for y in logits).backward()
        assert all(p.grad is not None for p in network.parameters())
        assert network.eval()(torch.randn(1, 1, 9, 12, 7)).shape == (1, 3, 9, 12, 7)

    @pytest.mark.parametrize(
        "variant, millions",  # with 9 classes; the body's is the paper's, docs/networks.md says why the others differ
        [(None, 57.23), ("SegMamba", 60.87), ("SegMambaSkip", 62.04), ("BiSegMamba", 64.52), ("MultiSegMamba", 86.38)],
    )
    def test_parameters_on_the_plan_for_synapse(self, variant, millions):
        with torch.device("meta"):
            network = TamingMambas(out_channels=9, variant=variant)
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)

    def test_states_follow_the_channels(self):
        network = TamingMambas(variant="SegMamba", max_d_state=12, **SMALL)
        assert [layer.mamba.A_log.shape[-1] for layer in network.mamba] == [8, 12, 12]

    @pytest.mark.parametrize(("variant", "levels"), [("UMambaBot", [2]), ("UMambaEnc", [0, 1, 2])])
    def test_u_mamba_has_a_block_of_its_own_kind_where_its_name_says(self, variant, levels):
        network = TamingMambas(variant=variant, **SMALL)
        assert [k for k, layer in enumerate(network.mamba) if isinstance(layer, ToM)] == levels
        assert all(isinstance(skip, torch.nn.Identity) for skip in network.skips)
        for k in levels:
            layer = network.mamba[k]
            assert (layer.orders, layer.residual, layer.A_log.shape[-1]) == (("dhw",), False, 16)

    def test_residual_weights_are_scaled_by_their_number(self):
        torch.manual_seed(0)
        network = TamingMambas(variant="SegMamba", **SMALL)
        for layer in network.mamba:
            bound = layer.mlp.weight.shape[1] ** -0.5 / (2 * 3) ** 0.5  # nn.Linear draws from +- in_features^-0.5
            assert 0.9 * bound < layer.mlp.weight.abs().max() <= bound

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_copies_and_round_trips(self, variant):
        network, x = TamingMambas(variant=variant, **SMALL).eval(), torch.randn(1, 1, 6, 8, 8)
        other = TamingMambas(variant=variant, **SMALL).eval()
        other.load_state_dict(network.state_dict())
        for copied in (other, copy.deepcopy(network)):
            assert torch.equal(copied(x), network(x))

    def test_engines_agree(self):
        torch.manual_seed(0)
        network, x = TamingMambas(variant="BiSegMamba", scan_engine="reference", **SMALL), torch.randn(1, 1, 5, 8, 9)
        expected = network(x)
        for module in network.modules():
            if hasattr(module, "scan_engine"):
                module.scan_engine = "auto"
        torch.testing.assert_close(network(x), expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize(
        "options, text",
        [
            ({"variant": "Segmamba"}, "unknown variant 'Segmamba'.*SegMambaSkip"),
            ({"spatial_dims": 2}, "spatial_dims must be 3"),
            ({"channels": (8, 16)}, "one value a level"),
        ],
    )
    def test_errors(self, options, text):
        with pytest.raises(ValueError, match=text):
            TamingMambas(**options)
