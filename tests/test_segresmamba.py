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
import pickle
import tracemalloc

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from scripts.complexity import dead_parameters, flops, paper_macs, parameter_counts, tom_macs
from scripts.segresmamba import SegResMamba
from scripts.tri_orientated_mamba import ToM

TEXT = {"depths": (1, 1, 1, 1), "stage_conv": False}  # the paper's text, Algorithm 1 and Figure 1
TABLES = {"depths": (2, 2, 2, 2), "stage_conv": True}  # what the paper's tables measured

SMALL = {"channels": (8, 16), "depths": (1, 1), "d_state": 4}

OPTIONS = {
    "default": {},
    "text": {"stage_conv": False},
    "without ToM": {"use_tom": False},
    "without ToM and stage conv": {"use_tom": False, "stage_conv": False},
    "without downsampling conv": {"downsample_conv": False},
    "gsc": {"block": "gsc", "downsample_conv": False},
    "gsc without ToM": {"block": "gsc", "use_tom": False},
    "residual": {"residual": True},
    "full-resolution skip": {"full_resolution_skip": 8},
    "stem of stride 1": {"stem_stride": 1},
    "anisotropic stem": {"stem_stride": (1, 2, 2), "full_resolution_skip": 8},
    "depths": {"depths": (0, 2)},
    "one order": {"orders": ("reverse",)},
    "four orders": {"orders": ("dhw", "-wdh", "hwd", "inter_slice")},
    "modalities": {"in_channels": 3, "out_channels": 5},
    "Mamba sizes": {"d_state": 3, "d_conv": 2, "expand": 1},
    "three levels": {"channels": (8, 16, 24), "depths": (1, 1, 2)},
}


def make(seed: int = 0, **options) -> SegResMamba:
    """A small seeded network."""
    torch.manual_seed(seed)
    return SegResMamba(**{**SMALL, **options})


def volume(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(network: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Gradients of a loss that weighs every output differently."""
    network.zero_grad(set_to_none=True)
    y = network(x)
    (y * volume(*y.shape, seed=2, dtype=y.dtype)).mean().backward()
    return {name: p.grad for name, p in network.named_parameters()}


def paper_network(in_channels: int, out_channels: int, **options) -> SegResMamba:
    """At full width, without values."""
    with torch.device("meta"):
        return SegResMamba(3, in_channels, out_channels, **options)


class TestPaperFigures:
    """The figures of architecture.md section 1.3: live parameters, and MACs counted as the paper's were."""

    @pytest.mark.parametrize("options, millions", [(TEXT, 68.26), (TABLES, 80.40)], ids=["text", "tables"])
    def test_parameters(self, options, millions):
        assert parameter_counts(paper_network(1, 14, **options))["all"] / 1e6 == pytest.approx(millions, abs=0.02)

    @pytest.mark.parametrize(
        "options, in_channels, out_channels, size, giga",
        [
            (TEXT, 1, 14, 128, 275.23),
            (TEXT, 4, 3, 128, 279.32),
            (TEXT, 1, 2, 96, 112.04),
            (TABLES, 1, 14, 128, 336.45),
            (TABLES, 4, 3, 128, 340.54),
            (TABLES, 1, 2, 96, 137.86),
        ],
    )
    def test_macs(self, options, in_channels, out_channels, size, giga):
        network = paper_network(in_channels, out_channels, **options)
        assert paper_macs(network, in_channels, size) / 1e9 == pytest.approx(giga, abs=0.02)

    def test_default_is_the_network_of_the_tables(self):
        assert str(SegResMamba(channels=(8,) * 4)) == str(SegResMamba(channels=(8,) * 4, **TABLES))

    def test_parameters_of_one_tom_on_each_level(self):
        count = sum(p.numel() for c in (48, 96, 192, 384) for p in ToM(c).parameters())
        assert count / 1e6 == pytest.approx(1.561, abs=0.0005)

    def test_parameters_of_the_ablation_differ_by_those_of_tom(self):
        with_tom, without = (parameter_counts(paper_network(1, 14, use_tom=flag)) for flag in (True, False))
        assert with_tom["tom"] > 0 and without["tom"] == 0
        assert with_tom["all"] - without["all"] == with_tom["tom"]

    def test_counting_leaves_the_network_as_it_was(self):
        network = make().train()
        before = copy.deepcopy(network)
        paper_macs(network, 1, 16), tom_macs(network, 1, 16), flops(network, 1, 16), dead_parameters(network, 1, 16)
        assert network.training and str(network) == str(before)
        assert network.state_dict().keys() == before.state_dict().keys()
        assert torch.equal(network(volume(1, 1, 16, 16, 16)), before(volume(1, 1, 16, 16, 16)))

    def test_tom_macs_against_layers_that_a_counter_sees(self):
        # one ToM alone: projections as thop counts nn.Linear, the convolution as it counts nn.Conv1d
        network = make(depths=(0, 0), channels=(16, 16))  # leaves one ToM a level, inside the mixed block
        counts = tom_macs(network, 1, (32, 16, 16))
        voxels = 8 * 4 * 4 + 4 * 2 * 2  # stem and mixed block halve, and between levels once more
        tom = next(m for m in network.modules() if isinstance(m, ToM))
        weights = [tom.in_proj.weight, tom.out_proj.weight, tom.x_proj_weight, tom.dt_proj_weight]
        assert counts["projections"] == voxels * sum(w.numel() for w in weights)  # each weight once a voxel
        assert counts["convolutions"] == voxels * tom.conv_weight.numel()
        assert counts["exponentials"] == voxels * tom.A_log.numel()
        assert counts["scans"] == voxels * (4 * tom.A_log.numel() + 2 * tom.D.numel() + tom.D.shape[1])
        assert set(tom_macs(make(use_tom=False), 1, 16).values()) == {0}


class TestShapes:
    @pytest.mark.parametrize(
        "size, options",
        [
            ((8, 8, 8), {}),
            ((8, 8, 8), {"channels": (8, 8, 8, 8), "depths": (1,) * 4}),
            ((8, 8, 8), {"channels": (8, 16, 24, 32, 40), "depths": (1,) * 5}),
            ((9, 11, 13), {}),
            ((9, 9, 9), {"channels": (8, 16, 24), "depths": (1, 0, 1), "full_resolution_skip": 8}),
            ((8, 21, 40), {"channels": (8, 16, 24), "depths": (1,) * 3}),
            ((17, 8, 33), {"channels": (8, 16, 24, 32), "depths": (1,) * 4}),
            ((31, 40, 24), {"channels": (8, 16, 24, 32, 40), "depths": (1,) * 5}),
            ((12, 20, 28), {"block": "gsc", "downsample_conv": False}),
            ((15, 10, 11), {"full_resolution_skip": 8}),
            ((9, 10, 11), {"stem_stride": 1}),
            ((8, 15, 21), {"stem_stride": (1, 2, 2), "full_resolution_skip": 8}),
            ((15, 8, 21), {"stem_stride": (2, 2, 1)}),
        ],
    )
    @pytest.mark.parametrize("batch", [1, 2])
    def test_logits_have_the_size_of_the_input(self, size, options, batch):
        network = make(in_channels=2, out_channels=3, **options)
        logits = network(volume(batch, 2, *size))
        assert logits.shape == (batch, 3, *size)
        assert torch.isfinite(logits).all()
        logits.sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())

    @pytest.mark.parametrize("size", [(9, 16, 16), (16, 13, 8), (11, 9, 17)])
    def test_an_odd_size_is_as_if_padded_with_zeros_to_an_even_one(self, size):
        network = make(channels=(8, 16, 24), depths=(1, 1, 1)).eval()
        x = volume(1, 1, *size)
        padded = F.pad(x, [side for axis in reversed(size) for side in (0, axis % 2)])
        d, h, w = size
        torch.testing.assert_close(network(x), network(padded)[:, :, :d, :h, :w], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", OPTIONS)
    def test_batch_items_are_independent(self, name):
        network = make(**OPTIONS[name])
        x = volume(3, network.in_channels, 10, 16, 13)
        together = network(x)
        for i in range(3):
            torch.testing.assert_close(network(x[i : i + 1]), together[i : i + 1], rtol=1e-4, atol=1e-5)

    def test_training_and_evaluation_mode_agree(self):
        network, x = make(), volume(1, 1, 16, 16, 16)
        assert torch.equal(network.train()(x), network.eval()(x))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_parameter_has_a_gradient(name):
    network = make(**OPTIONS[name])
    grads = gradients(network, volume(2, network.in_channels, 24, 18, 22))
    assert grads
    for parameter, grad in grads.items():
        assert grad is not None, f"{parameter} takes no part in the output"
        assert torch.isfinite(grad).all(), parameter
        if not parameter.endswith(".bias"):  # an InstanceNorm takes a bias before it out again
            assert grad.abs().max() > 1e-9, f"{parameter} makes no difference to the output"


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_copies_give_the_same_output(name, way, tmp_path):
    network = make(**OPTIONS[name])
    x = volume(1, network.in_channels, 16, 12, 14)
    expected = network(x)
    gradients(network, x)  # a copy is also taken after a training step
    if way == "deepcopy":
        other = copy.deepcopy(network)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(network))
    else:
        other = make(seed=5, **OPTIONS[name])
        assert not torch.equal(other(x), expected)
        torch.save(network.state_dict(), tmp_path / "model.pt")
        other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert torch.equal(network(x), expected)  # nothing is shared with the original


@pytest.mark.parametrize("options", [{}, {"block": "gsc"}, {"use_tom": False}], ids=["cmmb", "gsc", "without ToM"])
def test_checkpointing_changes_no_gradient(options):
    x = volume(1, 1, 16, 20, 13)
    plain, saving = (gradients(make(use_checkpoint=flag, **options), x) for flag in (False, True))
    assert plain.keys() == saving.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(saving[name], grad, rtol=1e-5, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps in tensors; those that NumPy keeps are seen by tracemalloc."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            self.storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        super().__init__(pack, lambda t: t)


def test_checkpointing_keeps_no_states_of_the_blocks():
    kept = []
    make()(volume(1, 1, 16, 16, 16))  # caches are filled
    for flag in (False, True):
        network, x = make(use_checkpoint=flag, channels=(16, 16), d_state=16), volume(1, 1, 40, 40, 40)
        tracemalloc.start()
        tensors = Kept()
        with tensors:
            loss = network(x).sum()
        kept.append((sum(tensors.storages.values()), tracemalloc.get_traced_memory()[0]))
        tracemalloc.stop()
        loss.backward()
    (tensors, arrays), (tensors_saving, arrays_saving) = kept
    assert tensors_saving < tensors
    assert arrays_saving < max(0.1 * arrays, 2**20), f"NumPy keeps {arrays_saving} bytes of {arrays}"


class TestOptionsMakeADifference:
    def test_use_tom(self):
        x, network = volume(1, 1, 16, 16, 16), make()
        ablation = make(use_tom=False)
        assert any(isinstance(m, ToM) for m in network.modules())
        assert not any(isinstance(m, ToM) for m in ablation.modules())
        ablation.load_state_dict(network.state_dict(), strict=False)
        # the same convolutions, numbered otherwise in the stages
        for mine, theirs in zip(ablation.blocks, network.blocks):
            convs = [m for m in theirs.stage if isinstance(m, nn.Conv3d)]
            for conv, other in zip(mine.stage, convs):
                conv.load_state_dict(other.state_dict())
        assert (network(x) - ablation(x)).abs().max() > 1e-3

    def test_every_tom_layer_is_called(self):
        network, called = make(depths=(2, 1)), []
        toms = [m for m in network.modules() if isinstance(m, ToM)]
        for tom in toms:
            tom.register_forward_hook(lambda module, args, output: called.append(module))
        network(volume(1, 1, 16, 16, 16))
        assert len(toms) == 2 + 1 + 2 and set(called) == set(toms)  # and one within each of two mixed blocks

    @pytest.mark.parametrize("options", [{"residual": True}, {"orders": ("forward", "forward", "inter_slice")}])
    def test_same_parameters_other_output(self, options):
        x, network, other = volume(1, 1, 16, 16, 16), make(), make(**options)
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
        assert (network(x) - other(x)).abs().max() > 1e-4

    @pytest.mark.parametrize(
        "options", [{"downsample_conv": False}, {"block": "gsc"}, {"stage_conv": False}, {"full_resolution_skip": 8}]
    )
    def test_other_parameters(self, options):
        assert parameter_counts(make()) != parameter_counts(make(**options))

    def test_dropout(self):
        """Off in evaluation; in training runs differ, and weights are those of the network without it."""
        network = make(dropout=0.5)
        network.load_state_dict(make().state_dict())
        x = volume(1, 1, 16, 16, 16)
        network.train()
        assert not torch.equal(network(x), network(x))
        assert torch.equal(network.eval()(x), network(x))


class TestPrecision:
    def test_float64(self):
        network, x = make(channels=(8, 16, 24), depths=(1, 1, 1)), volume(1, 1, 17, 12, 15)
        single = network(x)
        double = network.double()(x.double())
        assert double.dtype == torch.float64
        torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-4)
        assert all(torch.isfinite(g).all() for g in gradients(network, x.double()).values())

    @pytest.mark.parametrize("channels_last", [False, True])
    def test_bf16_autocast(self, channels_last):
        network, x = make(channels=(8, 16, 24), depths=(1, 1, 1)), volume(2, 1, 17, 12, 15)
        expected = network(x)
        if channels_last:
            network, x = network.to(memory_format=torch.channels_last_3d), x.to(memory_format=torch.channels_last_3d)
        with torch.autocast("cpu", torch.bfloat16):
            y = network(x)
            y.float().square().mean().backward()
        assert y.dtype == torch.bfloat16
        assert (y.float() - expected).norm() < 0.1 * expected.norm()
        assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in network.parameters())

    @pytest.mark.parametrize("name", OPTIONS)
    def test_channels_last_gives_the_same(self, name):
        network = make(**OPTIONS[name])
        x = volume(2, network.in_channels, 11, 16, 14)
        expected = network(x)
        expected_grads = {n: g.clone() for n, g in gradients(network, x).items()}
        network = network.to(memory_format=torch.channels_last_3d)
        x = x.to(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)
        grads = gradients(network, x)
        scale = max(g.abs().max() for g in expected_grads.values())
        for parameter, grad in expected_grads.items():
            assert (grads[parameter] - grad).abs().max() < 1e-4 * scale, parameter


class TestErrors:
    @pytest.mark.parametrize(
        "options, message",
        [
            ({"spatial_dims": 2}, "spatial_dims must be 3"),
            ({"channels": (8,), "depths": (1,)}, "at least two levels"),
            ({"channels": (8, 12)}, "multiple of 8"),
            ({"channels": (8, 0)}, "multiple of 8"),
            ({"channels": (8, -8)}, "multiple of 8"),
            ({"full_resolution_skip": 5}, "full_resolution_skip"),
            ({"stem_stride": 4}, "stem_stride must be 1 or 2"),
            ({"stem_stride": (0, 2, 2)}, "stem_stride must be 1 or 2"),
            ({"depths": (1, 1, 1)}, "for each of the levels"),
            ({"block": "unet"}, "'cmmb' or 'gsc', got 'unet'"),
            ({"orders": ()}, "at least one scan order"),
        ],
    )
    def test_arguments(self, options, message):
        with pytest.raises(ValueError, match=message):
            make(**options)

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"orders": ("sideways",)}, "unknown scan order 'sideways'"),
            ({"scan_engine": "abacus"}, "unknown scan engine"),
        ],
    )
    def test_arguments_of_the_scan(self, options, message):
        with pytest.raises(ValueError, match=message):
            make(**options)(volume(1, 1, 8, 8, 8))

    @pytest.mark.parametrize("shape", [(1, 1, 8, 8, 7), (1, 2, 16, 16, 16), (1, 16, 16, 16), (1, 1, 16, 16)])
    def test_inputs(self, shape):
        with pytest.raises(ValueError, match=r"expected a volume \(B, 1, D, H, W\) of at least 8") as error:
            make()(volume(*shape))
        assert str(shape) in str(error.value)


def test_bf16_gradients_where_the_deepest_volumes_are_smaller_than_the_kernels():
    torch.manual_seed(0)
    network = SegResMamba(channels=(16, 32, 64, 128), depths=(1, 1, 1, 1), stage_conv=False)
    x = torch.randn(2, 1, 24, 32, 24)

    def gradients(precision: torch.dtype | None) -> list[torch.Tensor]:
        torch.full((2_000_000,), float("nan"))  # freed at once: what uninitialised memory then holds
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            loss = network(x).float().square().mean()
        return list(torch.autograd.grad(loss, list(network.parameters())))

    exact = gradients(None)
    for _ in range(4):
        for (name, parameter), g, expected in zip(network.named_parameters(), gradients(torch.bfloat16), exact):
            assert torch.isfinite(g).all(), name
            if parameter.ndim == 5 and expected.norm() > 1e-6:
                assert torch.cosine_similarity(g.flatten(), expected.flatten(), dim=0) > 0.7, name
