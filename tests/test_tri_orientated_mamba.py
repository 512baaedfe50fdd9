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

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from scripts.segresmamba import SegResMamba
from scripts.selective_scan import SCAN_ORDERS, available_engines
from scripts.tri_orientated_mamba import TRI_ORIENTATED, ToM

ENGINES = [name for name, reason in available_engines().items() if reason is None]
ENGINES_64 = [name for name, reason in available_engines(dtype=torch.float64).items() if reason is None]

ORDER_SETS = [
    TRI_ORIENTATED,
    ("forward",),
    ("-hwd",),
    ("wdh", "-dwh"),
    ("hwd", "hdw", "whd", "dwh"),
    ("forward", "forward"),
]
SIZES = [(3, 4, 5), (7, 2, 3), (1, 1, 1), (1, 6, 1), (2, 1, 9)]


def walk(order: str, size: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """The voxels (d, h, w) of a scan order one after the other, by three nested loops."""
    axes = {"forward": "dhw", "reverse": "-dhw", "inter_slice": "hwd"}.get(order, order)
    letters = axes.strip("-")
    length = dict(zip("dhw", size))
    voxels = []
    for i in range(length[letters[0]]):
        for j in range(length[letters[1]]):
            for k in range(length[letters[2]]):
                at = dict(zip(letters, (i, j, k)))
                voxels.append((at["d"], at["h"], at["w"]))
    return voxels[::-1] if axes.startswith("-") else voxels


def plain_tom(tom: ToM, x: torch.Tensor) -> torch.Tensor:
    """
    ToM as the paper's section 2.1 and Mamba-1 describe it: for each order the volume is permuted and flipped into a
    sequence, goes through a mixer and comes back.
    """

    def to_sequence(v: torch.Tensor, order: str) -> torch.Tensor:  # (B, C, D, H, W) -> (B, C, L)
        axes = SCAN_ORDERS.get(order, order)
        v = v.permute(0, 1, *(2 + "dhw".index(a) for a in axes.strip("-"))).flatten(2)
        return v.flip(2) if axes.startswith("-") else v

    def to_volume(s: torch.Tensor, order: str) -> torch.Tensor:
        axes = SCAN_ORDERS.get(order, order)
        s = s.flip(2) if axes.startswith("-") else s
        letters = axes.strip("-")
        v = s.unflatten(2, [x.shape[2 + "dhw".index(a)] for a in letters])
        return v.permute(0, 1, *(2 + letters.index(a) for a in "dhw"))

    channels_last = F.layer_norm(x.movedim(1, -1), (x.shape[1],), tom.norm.weight, tom.norm.bias, 1e-5)
    u_volume, z = F.linear(channels_last, tom.in_proj.weight).movedim(-1, 1).chunk(2, dim=1)
    total = torch.zeros_like(u_volume)
    for k, order in enumerate(tom.orders):
        d, taps = tom.conv_weight.shape[1:]
        u = F.pad(to_sequence(u_volume, order), (taps - 1, 0))
        u = F.silu(F.conv1d(u, tom.conv_weight[k].unsqueeze(1), tom.conv_bias[k], groups=d))
        rank, n = tom.dt_proj_weight.shape[2], tom.A_log.shape[2]
        dt, B, C = torch.split(torch.einsum("bdl,rd->brl", u, tom.x_proj_weight[k]), [rank, n, n], dim=1)
        delta = torch.einsum("brl,dr->bdl", dt, tom.dt_proj_weight[k]) + tom.dt_proj_bias[k][:, None]
        delta = torch.log1p(torch.exp(delta))
        A = -torch.exp(tom.A_log[k])
        h, y = torch.zeros(x.shape[0], d, n, dtype=x.dtype), []
        for t in range(u.shape[2]):
            h = torch.exp(delta[:, :, t, None] * A) * h + delta[:, :, t, None] * B[:, None, :, t] * u[:, :, t, None]
            y.append((h * C[:, None, :, t]).sum(-1) + tom.D[k] * u[:, :, t])
        total = total + to_volume(torch.stack(y, dim=2), order)
    y = torch.einsum("bdxyz,cd->bcxyz", total * F.silu(z), tom.out_proj.weight)
    return x + y if tom.residual else y


def make(channels: int = 8, seed: int = 0, **options) -> ToM:
    """A seeded ToM whose parameters all differ from their start, so that each matters."""
    torch.manual_seed(seed)
    tom = ToM(channels, **options)
    with torch.no_grad():
        for name, parameter in tom.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.05 if name == "A_log" else 0.2))
    return tom


def run(function, tom: ToM, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output and the gradients by input and parameters."""
    x = x.detach().clone().requires_grad_()
    tom.zero_grad(set_to_none=True)
    y = function(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)
    (y * weight).sum().backward()
    return {"y": y.detach(), "x": x.grad, **{name: p.grad.clone() for name, p in tom.named_parameters()}}


def assert_close(actual: dict, expected: dict, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, e in expected.items():
        a = actual[name].double()
        assert torch.isfinite(a).all(), name
        error = (a - e.double()).abs().max() / e.abs().max().clamp(min=1e-12)
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("engine", ENGINES_64)
@pytest.mark.parametrize("orders", ORDER_SETS, ids=",".join)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float64_equals_the_plain_one(engine, orders, size):
    tom = make(orders=orders, scan_engine=engine).double()
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    assert_close(run(tom, tom, x), run(lambda x: plain_tom(tom, x), tom, x), 1e-10)


@pytest.mark.parametrize(
    "engine, size",
    # interpreted, the Triton engine takes seconds; test_selective_scan.py takes its mixer through larger volumes
    [(engine, size) for engine in ENGINES for size in ((5, 3, 11), (2, 1, 2)) if engine != "triton" or size[0] == 2],
    ids=str,
)
@pytest.mark.parametrize(
    "channels, options",
    [
        (16, {}),
        (8, {"orders": ("hwd", "-whd")}),
        (8, {"expand": 1}),  # an inner width that no SIMD block fills
        (12, {"d_state": 5, "d_conv": 2, "expand": 3}),
        (40, {"d_state": 16, "d_conv": 3, "orders": ("reverse",), "residual": True}),
        (16, {"d_conv": 1, "dt_rank": 5, "orders": ("-dwh",)}),
    ],
    ids=str,
)
def test_float32_equals_the_plain_one_in_float64(engine, channels, options, size):
    tom = make(channels, scan_engine=engine, **options)
    x = torch.randn(2, channels, *size)
    actual = run(tom, tom, x)
    double = tom.double()
    assert_close(actual, run(lambda x: plain_tom(double, x), double, x.double()), 2e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("order", ["forward", "reverse", "inter_slice", "wdh", "-hdw"])
@pytest.mark.parametrize("size, changed", [((3, 5, 2), (1, 2, 1)), ((6, 2, 3), (4, 0, 2)), ((2, 4, 4), (0, 0, 0))])
def test_one_order_is_causal_in_that_order(engine, order, size, changed):
    tom = make(orders=(order,), scan_engine=engine)
    x = torch.randn(1, 8, *size)
    other = x.clone()
    other[(0, slice(None), *changed)] += 1 + torch.arange(8)  # not a shift, which LayerNorm would take away
    difference = (tom(other) - tom(x)).abs().amax(1)[0]
    path = walk(order, size)
    at = path.index(changed)
    before, after = path[:at], path[at : at + tom.conv_weight.shape[2]]
    assert all(difference[voxel] == 0 for voxel in before)
    assert all(difference[voxel] > 1e-6 for voxel in after)  # as far as the convolution alone reaches


def test_inter_slice_goes_through_the_slices_of_the_real_depth():
    # at D = 7 a voxel is followed by its neighbour in the next slice, and the last slice by the next voxel's first
    size = (7, 3, 4)
    tom = make(orders=("inter_slice",), d_conv=2)
    with torch.no_grad():
        tom.D.fill_(1)
        tom.x_proj_weight.zero_()  # leaves D * SiLU(conv), which reaches one voxel ahead
    for changed, follower in (((2, 1, 1), (3, 1, 1)), ((6, 1, 1), (0, 1, 2)), ((6, 1, 3), (0, 2, 0))):
        x = torch.randn(1, 8, *size)
        other = x.clone()
        other[(0, slice(None), *changed)] += 1 + torch.arange(8)
        touched = (tom(other) - tom(x)).abs().amax(1)[0] > 0
        assert {tuple(v) for v in touched.nonzero().tolist()} == {changed, follower}


class TestInitialisation:
    """Mamba-1's start, which reset_parameters also gives back."""

    @pytest.fixture(params=["new", "reset"])
    def tom(self, request) -> ToM:
        torch.manual_seed(0)
        tom = ToM(48)
        if request.param == "reset":
            with torch.no_grad():
                for parameter in tom.parameters():
                    parameter.fill_(7)
            tom.reset_parameters()
        return tom

    def test_state_matrix(self, tom):
        expected = -torch.arange(1, 17).float().expand(3, 96, 16)
        torch.testing.assert_close(-torch.exp(tom.A_log), expected, rtol=1e-5, atol=1e-5)
        assert (tom.D == 1).all()

    def test_step_sizes_are_log_uniform(self, tom):
        dt = F.softplus(tom.dt_proj_bias.detach().double())
        assert dt.min() >= 1e-3 * (1 - 1e-4) and dt.max() <= 1e-1 * (1 + 1e-4)
        low, high = math.log(1e-3), math.log(1e-1)
        assert abs(dt.log().mean() - (low + high) / 2) < 0.05 * (high - low)
        assert dt.log().std().item() == pytest.approx((high - low) / math.sqrt(12), rel=0.1)

    def test_the_rest_as_linear_and_conv1d_start(self, tom):
        for weight, fan_in in (
            (tom.conv_weight, 4),
            (tom.conv_bias, 4),
            (tom.x_proj_weight, 96),
            (tom.dt_proj_weight, math.ceil(48 / 16)),
            (tom.in_proj.weight, 48),
            (tom.out_proj.weight, 96),
        ):
            bound = fan_in**-0.5
            assert 0.95 * bound < weight.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert (tom.norm.weight == 1).all() and (tom.norm.bias == 0).all()

    def test_orders_own_what_lies_between_the_projections(self, tom):
        shapes = {name: tuple(p.shape) for name, p in tom.named_parameters()}
        assert shapes.pop("in_proj.weight") == (192, 48) and shapes.pop("out_proj.weight") == (48, 96)
        assert shapes.pop("norm.weight") == shapes.pop("norm.bias") == (48,)
        assert all(shape[0] == 3 for shape in shapes.values())
        assert not torch.equal(tom.conv_weight[0], tom.conv_weight[1])


@pytest.mark.parametrize("engine", ENGINES)
def test_residual_adds_the_input(engine):
    plain, residual = (make(residual=flag, scan_engine=engine) for flag in (False, True))
    x = torch.randn(2, 8, 3, 2, 3)
    torch.testing.assert_close(residual(x), x + plain(x))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_output_has_the_memory_format_of_the_input(engine, channels_last):
    tom, x = make(scan_engine=engine), torch.randn(2, 8, 3, 2, 3)
    expected = tom(x)
    if channels_last:
        x = x.to(memory_format=torch.channels_last_3d)
    y = tom(x)
    memory_format = torch.channels_last_3d if channels_last else torch.contiguous_format
    assert y.shape == x.shape and y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    "engine, dtype",
    [(e, t) for e in ENGINES for t in (torch.bfloat16, torch.float16) if e != "triton" or t == torch.float16],
)
def test_half_precision(engine, dtype):
    tom, x = make(16, scan_engine=engine), torch.randn(1, 16, 3, 2, 3)
    expected = tom(x)
    with torch.autocast("cpu", dtype):
        y = tom(x)
        y.float().sum().backward()
    assert y.dtype == dtype
    assert (y - expected).abs().max() < 0.05 * expected.abs().max()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in tom.parameters())


def test_engines_agree_in_a_whole_network():
    def network(engine: str) -> SegResMamba:
        torch.manual_seed(3)
        return SegResMamba(channels=(8, 24), depths=(1, 1), scan_engine=engine)

    # On a smaller volume the deepest normalisation, over few voxels, loses digits in any engine.
    x = torch.randn(1, 1, 9, 8, 11, generator=torch.Generator().manual_seed(0))
    results = {engine: run(net, net, x) for engine in ENGINES for net in [network(engine)]}
    expected = results.pop("reference")
    assert results
    scale = max(e.abs().max() for name, e in expected.items() if name != "y")
    for engine, result in results.items():
        for name, e in expected.items():
            error = (result[name] - e).abs().max() / (e.abs().max() if name == "y" else scale)
            assert error < 1e-4, f"{engine}, {name}: {error:.2e}"


class TestInProj:
    """Engines may take its weight in two halves, but only where it is all that in_proj does."""

    class Adapter(nn.Module):
        """As those of PEFT: the weight that it shows is not all that it does."""

        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.low = base, nn.Parameter(0.1 * torch.randn(base.out_features, base.in_features))

        @property
        def weight(self) -> torch.Tensor:
            return self.base.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + F.linear(x, self.low)

    @pytest.mark.parametrize("engine", ENGINES)
    def test_an_adapter_is_used_and_trained(self, engine):
        plain, adapted = make(16, scan_engine=engine), make(16, scan_engine=engine)
        adapted.in_proj = self.Adapter(adapted.in_proj)
        with torch.no_grad():
            plain.in_proj.weight += adapted.in_proj.low
        x = torch.randn(1, 16, 2, 1, 3)
        actual, expected = run(adapted, adapted, x), run(plain, plain, x)
        expected["in_proj.low"] = expected["in_proj.base.weight"] = expected.pop("in_proj.weight")
        assert_close(actual, expected, 1e-5)

    def test_a_bias_and_hooks_work(self):
        x, called = torch.randn(1, 16, 2, 1, 3), []
        tom = make(16)
        expected = tom(x)
        tom.in_proj.register_forward_hook(lambda *_: called.append(True))
        torch.testing.assert_close(tom(x), expected)
        assert called
        tom.in_proj = nn.Linear(16, 64)
        assert "in_proj.bias" in run(tom, tom, x)
        prune.l1_unstructured(tom.in_proj, "weight", 0.5)
        for _ in range(2):  # its hook makes the weight anew
            tom(x).sum().backward()


class TestErrors:
    @pytest.mark.parametrize("order", ["up", "dh", "dhwd", "ddh", "", "-", "--dhw", "dhw-"])
    def test_unknown_order(self, order):
        with pytest.raises(ValueError, match=f"unknown scan order '{order}'"):
            ToM(8, orders=(order,))(torch.randn(1, 8, 2, 3, 4))

    def test_no_order(self):
        with pytest.raises(ValueError, match="at least one scan order"):
            ToM(8, orders=())

    def test_unknown_engine(self):
        with pytest.raises(ValueError, match="unknown scan engine 'abacus'"):
            ToM(8, scan_engine="abacus")(torch.randn(1, 8, 2, 3, 4))
