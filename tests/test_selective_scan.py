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

import importlib
import importlib.util
import logging
import os
import subprocess
import sys
import threading
import tracemalloc
import types
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scripts.selective_scan import (
    ENGINE_VARIABLE,
    SCAN_ORDERS,
    available_engines,
)
from scripts.selective_scan import engines as engine_registry
from scripts.selective_scan import order_index, oriented_mixer, selective_scan, selective_scan_channels_last

AVAILABLE = available_engines()
ENGINES = [name for name, reason in AVAILABLE.items() if reason is None]
FAST = [name for name in ENGINES if name != "reference"]  # the reference is the yardstick of the others
NATIVE = [name for name in FAST if name != "triton"]  # threads and arrays of an interpreter say nothing of its kernels


def pairs(values: list, interpreted: list) -> list[tuple]:
    """The engines with each of the values; with a few where kernels are interpreted, which takes seconds."""
    return [(engine, value) for engine in FAST for value in (interpreted if engine == "triton" else values)]


def steps(engine: str, length: int) -> int:
    """A length for an engine: interpreted, a step takes milliseconds. It crosses a chunk, see ``short_chunks``."""
    return min(length, 20) if engine == "triton" else length


PERMUTATIONS = [sign + axes for sign in ("", "-") for axes in ("dhw", "dwh", "hdw", "hwd", "wdh", "whd")]


@pytest.fixture(autouse=True)
def no_engine_forced(monkeypatch):
    """The engine is the one that a test names, whatever the environment says."""
    monkeypatch.delenv(ENGINE_VARIABLE, raising=False)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch, request):
    """Chunks and tiles of 16 steps where kernels are interpreted; with the mark ``long_chunks`` as long as on a GPU."""
    if "triton" in FAST and not request.node.get_closest_marker("long_chunks"):
        from scripts.selective_scan import triton_mixer, triton_scan

        monkeypatch.setattr(triton_scan, "_chunk", lambda d: 16)
        monkeypatch.setitem(triton_mixer._TILE, "T", 16)


@pytest.fixture
def fresh_registry():
    """Nothing is remembered from an earlier probe, nor remembered after the test."""

    def clear() -> None:
        for function in vars(engine_registry).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()

    clear()
    yield
    clear()


def arguments(
    batch: int = 2,
    d: int = 16,
    n: int = 4,
    length: int = 65,
    groups: int | None = None,
    with_D: bool = True,
    with_z: bool = True,
    with_bias: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor | None]:
    """Arguments of ``selective_scan``, of the size that they have in a Mamba; A, D and delta_bias in float32."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    BC = (batch, n, length) if groups is None else (batch, groups, n, length)
    return {
        "u": normal(batch, d, length).to(dtype),
        "delta": (normal(batch, d, length) * 0.5 - 1).to(dtype),
        "A": -torch.rand(d, n, generator=g) * 2 - 0.1,
        "B": normal(*BC).to(dtype),
        "C": normal(*BC).to(dtype),
        "D": normal(d) if with_D else None,
        "z": normal(batch, d, length).to(dtype) if with_z else None,
        "delta_bias": normal(d) * 0.5 if with_bias else None,
    }


def run(
    tensors: dict[str, torch.Tensor | None],
    engine: str,
    dtype: torch.dtype | None = None,
    function=selective_scan,
    **options,
) -> dict[str, torch.Tensor]:
    """The output, the last state and all gradients of a loss that weighs every output differently."""
    leaves = {
        name: None if t is None else t.detach().to(dtype or t.dtype).clone().requires_grad_()
        for name, t in tensors.items()
    }
    y, last_state = function(**leaves, return_last_state=True, engine=engine, **options)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    (y * weight).sum().backward()
    result = {"y": y.detach(), "last_state": last_state}
    result.update((name, t.grad) for name, t in leaves.items() if t is not None)
    return result


def assert_close(actual: dict, expected: dict, tolerance: float) -> None:
    """Largest difference over largest value, of each result; a gradient that is zero everywhere must be small."""
    assert actual.keys() == expected.keys()
    for name, e in expected.items():
        a, e = actual[name].double(), e.double()
        assert a.shape == e.shape, name
        assert torch.isfinite(a).all(), f"{name} is not finite"
        error = (a - e).abs().max() / e.abs().max().clamp(min=1e-8)
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


def check(engine: str, tensors: dict, tolerance: float = 1e-5, **options) -> dict[str, torch.Tensor]:
    """Compare an engine with the token loop in float64 on the same values."""
    actual = run(tensors, engine, **options)
    assert_close(actual, run(tensors, "reference", torch.float64, **options), tolerance)
    return actual


def formula(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """
    What mamba-ssm's documentation says of ``selective_scan_fn``, written anew: r is for the real state, x = state,
    ``x' = exp(delta A) x + delta B u``, ``y = C x + D u``, times SiLU(z); in float32, the output in the dtype of u.
    """
    work = torch.float64 if u.dtype == torch.float64 else torch.float32
    dt = delta.to(work)
    if delta_bias is not None:
        dt = dt + delta_bias.to(work).reshape(1, -1, 1)
    if delta_softplus:
        dt = torch.where(dt > 20, dt, torch.log1p(torch.exp(dt.clamp(max=20))))
    batch, d, length = u.shape

    def per_channel(M: torch.Tensor) -> torch.Tensor:  # -> (batch, d, n, length)
        M = M.to(work)
        if M.ndim == 2:
            return M[None, :, :, None].expand(batch, -1, -1, length)
        if M.ndim == 3:
            return M[:, None].expand(-1, d, -1, -1)
        return torch.stack([M[:, channel * M.shape[1] // d] for channel in range(d)], dim=1)

    Bd, Cd, x = per_channel(B), per_channel(C), torch.zeros(batch, d, A.shape[1], dtype=work)
    columns = []
    for t in range(length):
        step = dt[:, :, t].unsqueeze(-1)
        x = torch.exp(step * A.to(work)) * x + step * u[:, :, t, None].to(work) * Bd[..., t]
        columns.append(torch.einsum("bdn,bdn->bd", x, Cd[..., t]))
    y = torch.stack(columns, dim=-1)
    if D is not None:
        y = y + D.to(work)[:, None] * u.to(work)
    if z is not None:
        y = y * z.to(work) * torch.sigmoid(z.to(work))
    return (y.to(u.dtype), x) if return_last_state else y.to(u.dtype)


class TestEngines:
    def test_all_engines_are_listed_and_the_unavailable_say_why(self):
        assert set(AVAILABLE) == {"reference", "chunked", "numba", "triton", "mamba_ssm"}
        assert {"reference", "chunked"} <= set(ENGINES)
        for name, reason in AVAILABLE.items():
            assert reason is None or len(reason.split()) > 2, name

    def test_every_file_of_an_engine_is_listed(self):
        folder = Path(engine_registry.__file__).parent
        engines = {path.stem for path in folder.glob("*.py") if "\ndef scan(" in path.read_text()}
        assert engines == set(AVAILABLE)

    @pytest.mark.parametrize("engine", AVAILABLE)
    def test_an_unavailable_engine_raises_its_reason(self, engine):
        if AVAILABLE[engine] is None:
            pytest.skip(f"{engine} is available")
        with pytest.raises(RuntimeError) as error:
            selective_scan(**arguments(), engine=engine)
        assert AVAILABLE[engine] in str(error.value) and repr(engine) in str(error.value)

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="unknown scan engine 'abacus'") as error:
            selective_scan(**arguments(), engine="abacus")
        assert all(name in str(error.value) for name in AVAILABLE)

    @pytest.mark.parametrize("forced", ENGINES)
    def test_the_environment_forces_an_engine(self, monkeypatch, forced):
        tensors, called = arguments(length=20), []
        expected = selective_scan(**tensors, delta_softplus=True, engine=forced)
        module = engine_registry.resolve_engine(forced, torch.device("cpu"), torch.float32)
        scan = module.scan
        monkeypatch.setattr(module, "scan", lambda *args: called.append(forced) or scan(*args))
        monkeypatch.setenv(ENGINE_VARIABLE, forced)
        for named in ("auto", "reference", "chunked"):
            assert torch.equal(selective_scan(**tensors, delta_softplus=True, engine=named), expected)
        assert called == [forced] * 3

    @pytest.mark.parametrize("forced", ["", "auto"])
    def test_an_empty_variable_or_auto_forces_nothing(self, monkeypatch, forced):
        monkeypatch.setenv(ENGINE_VARIABLE, forced)
        assert selective_scan(**arguments()).shape == (2, 16, 65)

    def test_the_environment_with_an_unknown_name(self, monkeypatch):
        monkeypatch.setenv(ENGINE_VARIABLE, "abacus")
        with pytest.raises(ValueError, match=f"'abacus'.*{ENGINE_VARIABLE}"):
            selective_scan(**arguments())

    def test_the_environment_with_an_engine_that_does_not_take_the_tensors(self, monkeypatch):
        monkeypatch.setenv(ENGINE_VARIABLE, "mamba_ssm")
        if available_engines()["mamba_ssm"] is None:
            pytest.skip("a CUDA device and mamba-ssm are here")
        with pytest.raises(RuntimeError, match=f"'mamba_ssm'.*{ENGINE_VARIABLE}.*not available"):
            selective_scan(**arguments())

    def test_numba_refuses_float64_and_says_so(self):
        assert "float64" in available_engines(dtype=torch.float64)["numba"] or AVAILABLE["numba"] is not None

    def test_auto_logs_its_choice_once(self, fresh_registry, caplog):
        with caplog.at_level(logging.INFO):
            for _ in range(3):
                selective_scan(**arguments())
        chosen = [record.getMessage() for record in caplog.records if ENGINE_VARIABLE in record.getMessage()]
        assert len(chosen) == 1 and repr(ENGINES[0]) in chosen[0] and "cpu" in chosen[0]

    def test_without_numba_auto_falls_back_to_chunked(self, fresh_registry, monkeypatch, caplog):
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *args: None if name == "numba" else find_spec(name, *args)
        )
        assert "pip install numba" in available_engines()["numba"]
        with pytest.raises(RuntimeError, match="pip install numba"):
            selective_scan(**arguments(), engine="numba")
        with caplog.at_level(logging.INFO):
            y = selective_scan(**arguments(), delta_softplus=True)
        if engine_registry.resolve_engine("auto", torch.device("cpu"), torch.float32).__name__.endswith("mamba_ssm"):
            pytest.skip("mamba-ssm comes before")
        assert torch.equal(y, selective_scan(**arguments(), delta_softplus=True, engine="chunked"))
        assert "'chunked'" in caplog.text

    def test_where_numba_does_not_start_auto_falls_back_too(self, fresh_registry, monkeypatch):
        import_module = importlib.import_module

        def broken(name, *args):
            if name == "numba":
                raise ImportError("Numba needs NumPy 2.4 or less. Got NumPy 2.5.")
            return import_module(name, *args)

        monkeypatch.setattr(importlib, "import_module", broken)
        assert "Numba needs NumPy 2.4" in available_engines()["numba"]
        chosen = engine_registry.resolve_engine("auto", torch.device("cpu"), torch.float32)
        assert chosen.__name__.endswith(("chunked", "mamba_ssm"))


class TestAgainstReference:
    @pytest.mark.parametrize("engine, length", pairs([1, 2, 63, 64, 65, 1000], interpreted=[1, 16, 33]))
    @pytest.mark.parametrize("batch, d, n, groups", [(1, 16, 16, None), (2, 40, 4, 2)])
    def test_lengths(self, engine, length, batch, d, n, groups):
        check(engine, arguments(batch, d, n, length, groups), delta_softplus=True)

    @pytest.mark.long_chunks
    @pytest.mark.skipif("triton" not in FAST, reason=str(AVAILABLE["triton"]))
    @pytest.mark.parametrize("length, d", [(127, 4), (129, 4), (17, 260)])
    def test_chunks_as_long_as_on_a_gpu(self, length, d):
        check("triton", arguments(1, d, 4, length), delta_softplus=True)

    @pytest.mark.parametrize("engine, d", pairs([4, 16, 40, 96, 130], interpreted=[40]))
    @pytest.mark.parametrize("n, batch, groups", [(1, 1, None), (4, 3, 2), (16, 2, None), (24, 1, 2), (16, 1, 1)])
    def test_widths(self, engine, d, n, batch, groups):
        check(engine, arguments(batch, d, n, steps(engine, 70), groups), delta_softplus=True)

    @pytest.mark.parametrize("engine", FAST)
    def test_256_states(self, engine):
        check(engine, arguments(1, 4, 256, steps(engine, 70)), delta_softplus=True)

    @pytest.mark.parametrize("engine", FAST)
    def test_many_states_over_several_chunks(self, engine):
        check(engine, arguments(1, 4, 24, steps(engine, 130)), delta_softplus=True)

    @pytest.mark.parametrize("engine", FAST)
    @pytest.mark.parametrize("with_D", [False, True])
    @pytest.mark.parametrize("with_z", [False, True])
    @pytest.mark.parametrize("with_bias", [False, True])
    @pytest.mark.parametrize("softplus", [False, True])
    def test_absent_arguments(self, engine, with_D, with_z, with_bias, softplus):
        tensors = arguments(length=steps(engine, 67), with_D=with_D, with_z=with_z, with_bias=with_bias)
        if not softplus:
            tensors["delta"] = tensors["delta"].abs()
        check(engine, tensors, delta_softplus=softplus)

    @pytest.mark.parametrize("engine", ENGINES)
    @pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
    def test_half_precision(self, engine, dtype, tolerance):
        tensors = arguments(dtype=dtype, length=steps(engine, 200))
        result = check(engine, tensors, tolerance, delta_softplus=True)
        assert result["y"].dtype == dtype and result["last_state"].dtype == torch.float32
        for name, t in tensors.items():
            assert result[name].dtype == t.dtype, name
        # the state is float32: nothing but the inputs and the output is rounded
        exact = run(tensors, "reference", torch.float64, delta_softplus=True)
        assert (result["last_state"] - exact["last_state"]).abs().max() <= 1e-5 * exact["last_state"].abs().max()

    @pytest.mark.parametrize(
        "engine", [name for name, why in available_engines(dtype=torch.float64).items() if not why]
    )
    def test_float64(self, engine):
        result = check(engine, {k: v.double() for k, v in arguments(length=130).items()}, 1e-12, delta_softplus=True)
        assert result["y"].dtype == torch.float64

    @pytest.mark.parametrize("engine", FAST)
    @pytest.mark.parametrize("B_shape, C_shape", [("dn", "dn"), ("dn", "bnl"), ("bnl", "dn"), ("dn", "bgnl")])
    def test_constant_B_and_C(self, engine, B_shape, C_shape):
        length = steps(engine, 40)
        tensors = arguments(batch=2, d=4, n=3, length=length)
        sizes = {"dn": (4, 3), "bnl": (2, 3, length), "bgnl": (2, 2, 3, length)}
        tensors["B"], tensors["C"] = torch.randn(sizes[B_shape]), torch.randn(sizes[C_shape])
        actual = run(tensors, engine, delta_softplus=True)
        leaves = {k: v.double().requires_grad_() for k, v in tensors.items()}
        y, state = formula(**leaves, delta_softplus=True, return_last_state=True)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).double()
        (y * weight).sum().backward()
        assert_close(actual, {"y": y, "last_state": state, **{k: v.grad for k, v in leaves.items()}}, 1e-5)

    @pytest.mark.parametrize("engine", FAST)
    def test_one_tensor_as_B_and_C(self, engine):
        tensors = {k: v.movedim(-1, 1) if v.ndim >= 3 else v for k, v in arguments(groups=2, length=20).items()}

        def gradient(engine: str, shared: bool) -> torch.Tensor:
            B = tensors["B"].clone().requires_grad_()
            both = {"B": B, "C": B if shared else B.clone()}
            selective_scan_channels_last(**{**tensors, **both}, delta_softplus=True, engine=engine).sum().backward()
            return B.grad

        expected = gradient("reference", shared=True)
        torch.testing.assert_close(gradient(engine, shared=False), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradient(engine, shared=True), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("engine", FAST)
    def test_noncontiguous_inputs(self, engine):
        tensors = arguments(batch=2, d=40, n=5, length=steps(engine, 90))

        def scattered(t: torch.Tensor) -> torch.Tensor:
            wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), float("nan"))
            view = wide[..., 1::2]
            view.copy_(t)
            return view

        expected = selective_scan(**tensors, delta_softplus=True, engine=engine)
        views = {name: scattered(t) for name, t in tensors.items()}
        assert not views["u"].is_contiguous() and not views["A"].is_contiguous()
        torch.testing.assert_close(selective_scan(**views, delta_softplus=True, engine=engine), expected)

    @pytest.mark.parametrize("engine", ENGINES)
    def test_expanded_inputs_and_gradient(self, engine):
        tensors = arguments(batch=3, length=steps(engine, 65), with_z=False)
        tensors["u"] = tensors["u"][:1].expand(3, -1, -1)
        leaves = {k: v.clone().requires_grad_() for k, v in tensors.items() if v is not None}
        selective_scan(**leaves, delta_softplus=True, engine=engine).sum().backward()  # an expanded gradient
        double = {k: v.detach().double().requires_grad_() for k, v in leaves.items()}
        selective_scan(**double, delta_softplus=True, engine="reference").sum().backward()
        assert_close({k: v.grad for k, v in leaves.items()}, {k: v.grad for k, v in double.items()}, 1e-5)

    @pytest.mark.parametrize("engine", FAST)
    @pytest.mark.parametrize("needed", ["u", "A", "B", "D", "delta_bias", "z"])
    def test_a_gradient_for_one_argument_alone(self, engine, needed):
        tensors = arguments(length=steps(engine, 65))

        def gradient(engine: str) -> torch.Tensor:
            leaf = tensors[needed].clone().requires_grad_()
            selective_scan(**{**tensors, needed: leaf}, delta_softplus=True, engine=engine).square().sum().backward()
            return leaf.grad

        torch.testing.assert_close(gradient(engine), gradient("reference"), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("engine", ENGINES)
    def test_last_state(self, engine):
        tensors = arguments(length=steps(engine, 65))
        y, state = selective_scan(**tensors, delta_softplus=True, return_last_state=True, engine=engine)
        assert torch.equal(y, selective_scan(**tensors, delta_softplus=True, engine=engine))
        assert state.shape == (2, 16, 4) and not state.requires_grad
        expected = formula(**tensors, delta_softplus=True, return_last_state=True)[1]
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)

    def test_gradcheck_of_chunked(self):
        # 40 tokens are two and a half of its chunks
        tensors = [t.double().requires_grad_() for t in arguments(1, 4, 2, 40, groups=2).values()]
        index = order_index("-hwd", (2, 4, 5), torch.device("cpu"))
        scan = engine_registry.resolve_engine("chunked", torch.device("cpu"), torch.float64).scan

        def channels_last(u, delta, A, B, C, D, z, bias):
            u, delta, z, B, C = (t.movedim(-1, 1) for t in (u, delta, z, B, C))
            return scan(u, delta, A, B, C, D, z, bias, True, index)[0]

        assert torch.autograd.gradcheck(channels_last, tensors, fast_mode=True)


class TestExtremes:
    @pytest.mark.long_chunks
    @pytest.mark.parametrize("engine", FAST)
    def test_gradients_of_states_that_decay_at_once_keep_their_digits(self, engine):
        """State by state, since an optimizer divides each by its own size."""
        tensors = arguments(1, 16, 16, 130, with_z=False, with_bias=False)
        tensors["A"] = -torch.arange(1.0, 17).repeat(16, 1)
        tensors["delta"] = 0.5 + 0.5 * torch.rand(tensors["delta"].shape, generator=torch.Generator().manual_seed(5))
        actual, expected = run(tensors, engine), run(tensors, "reference", torch.float64)
        error = (actual["A"] - expected["A"]).abs().amax(0) / expected["A"].abs().amax(0)
        assert (error <= 1e-4).all(), error

    @pytest.mark.parametrize("engine", FAST)
    @pytest.mark.parametrize("step", [1e2, 1e4, 1e6])
    def test_one_large_step_among_small_ones(self, engine, step):
        tensors = arguments(1, 16, 4, 50 if engine == "triton" else 130, with_z=False, with_bias=False)
        tensors["delta"] = torch.full_like(tensors["delta"], 1e-3)
        tensors["delta"][..., 40] = step
        actual, expected = run(tensors, engine), run(tensors, "reference", torch.float64)
        for name in ("y", "last_state", "u", "C"):
            after = {
                key: r[name][..., 41:] if name in ("y", "u", "C") else r[name]
                for key, r in (("a", actual), ("e", expected))
            }
            assert (after["a"] - after["e"]).abs().max() <= 1e-5 * after["e"].abs().max(), name

    @pytest.mark.parametrize("engine", ENGINES)
    @pytest.mark.parametrize("step", [30.0, 1e4, 1e8])
    @pytest.mark.parametrize("softplus", [False, True])
    def test_large_steps(self, engine, step, softplus):
        tensors = arguments(length=steps(engine, 70), n=16)
        tensors["delta"] = tensors["delta"].abs() * step
        tensors["A"] = -torch.arange(1, 17).float().repeat(16, 1)
        check(engine, tensors, 2e-5, delta_softplus=softplus)

    @pytest.mark.parametrize("engine", ENGINES)
    def test_one_large_step_forgets_what_came_before(self, engine):
        tensors = arguments(length=70, with_bias=False)
        tensors["delta"] = tensors["delta"].abs()
        tensors["delta"][:, :, 40] = 1e4
        other = {**tensors, "u": tensors["u"].clone()}
        other["u"][:, :, :40] += 1
        y, other_y = (selective_scan(**t, engine=engine)[:, :, 40:] for t in (tensors, other))
        torch.testing.assert_close(y, other_y, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("engine", ENGINES)
    @pytest.mark.parametrize("bias", [-1e4, -90.0])
    def test_vanishing_steps(self, engine, bias):
        tensors = arguments(length=steps(engine, 70))
        tensors["delta_bias"] = torch.full((16,), bias)
        result = run(tensors, engine, delta_softplus=True)
        assert all(torch.isfinite(t).all() for t in result.values())
        skip = tensors["D"][:, None] * tensors["u"] * F.silu(tensors["z"])
        torch.testing.assert_close(result["y"], skip, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("engine", FAST)
    def test_growing_states(self, engine):
        tensors = arguments(length=steps(engine, 90))
        tensors["A"] = tensors["A"].abs() * 0.3  # exp(delta A) above one
        check(engine, tensors, 2e-5, delta_softplus=True)

    @pytest.mark.parametrize("engine", FAST)
    def test_negative_steps(self, engine):
        tensors = arguments(length=steps(engine, 66), with_bias=False)
        tensors["delta"] = tensors["delta"] * 0.2  # most of them negative, and no softplus
        check(engine, tensors, 2e-5)

    @pytest.mark.parametrize("engine, d", pairs([16, 40], interpreted=[40]))
    @pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
    @pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF], ids=["nan", "nan of all bits"])
    def test_nan_comes_out_where_the_reference_has_it(self, engine, d, name, bits):
        where, length = (15, 20) if engine == "triton" else (70, 140)
        tensors = arguments(d=d, length=length)
        at = dict.fromkeys(("u", "delta", "z"), (1, 3, where)) | dict.fromkeys("BC", (1, 2, where)) | {"A": (3, 2)}
        tensors[name][at.get(name, (3,))] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        expected = selective_scan(**tensors, delta_softplus=True, engine="reference").isnan()
        assert expected.any() and not expected.all()
        assert torch.equal(selective_scan(**tensors, delta_softplus=True, engine=engine).isnan(), expected)


class TestOrders:
    ORDERS = [*PERMUTATIONS, *SCAN_ORDERS]
    SIZES = [(3, 4, 5), (1, 7, 2), (5, 2, 13)]
    CASES = list(product([*NATIVE, "reference"], ORDERS, SIZES))
    if "triton" in FAST:
        CASES += product(["triton"], ORDERS, [(2, 4, 3)])

    @staticmethod
    def sequence(t: torch.Tensor, order: str, size: tuple[int, int, int]) -> torch.Tensor:
        """Tokens (batch, L, ...) in raster order to tokens in the order's, by permuting and flipping the volume."""
        axes = SCAN_ORDERS.get(order, order)
        v = t.unflatten(1, size)
        v = v.permute(0, *(1 + "dhw".index(a) for a in axes.strip("-")), *range(4, v.ndim)).flatten(1, 3)
        return v.flip(1) if axes.startswith("-") else v

    @pytest.mark.parametrize("engine, order, size", CASES, ids=str)
    def test_order_equals_permuting_the_volume(self, engine, order, size):
        length = size[0] * size[1] * size[2]
        tensors = arguments(2, 16, 3, length, groups=2)
        raster = {k: v.movedim(-1, 1) if k in ("u", "delta", "z", "B", "C") else v for k, v in tensors.items()}
        walked = {k: self.sequence(v, order, size) if v.ndim > 2 else v for k, v in raster.items()}
        options = {"function": selective_scan_channels_last, "delta_softplus": True}

        def weighed(order=None, spatial_shape=None, **leaves):
            y, state = selective_scan_channels_last(**leaves, order=order, spatial_shape=spatial_shape)
            # the loss weighs voxels, not steps
            return (y if order is None else self.sequence(y, order, size)), state

        options["function"] = weighed
        actual = run(raster, engine, order=order, spatial_shape=size, **{k: options[k] for k in options})
        expected = run(walked, "reference", **options)
        for name, t in actual.items():
            if name in ("u", "delta", "z", "B", "C"):
                actual[name] = self.sequence(t, order, size)
        assert_close(actual, expected, 1e-5)

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_index_lists_the_raster_positions(self, order, size):
        index = order_index(order, size, torch.device("cpu"))
        raster = torch.arange(size[0] * size[1] * size[2])
        index = raster if index is None else index
        assert index.dtype == torch.int64
        assert torch.equal(index, self.sequence(raster[None], order, size)[0])

    def test_the_papers_names(self):
        # section 2.1 for a volume of (2, 2, 3): t = (d * 2 + h) * 3 + w
        raster = [(d * 2 + h) * 3 + w for d in range(2) for h in range(2) for w in range(3)]
        inter_slice = [(d * 2 + h) * 3 + w for h in range(2) for w in range(3) for d in range(2)]
        device = torch.device("cpu")
        assert order_index("forward", (2, 2, 3), device) is None  # raster order is no index
        assert order_index("reverse", (2, 2, 3), device).tolist() == raster[::-1]
        assert order_index("inter_slice", (2, 2, 3), device).tolist() == inter_slice

    @pytest.mark.parametrize("engine", [*NATIVE, "reference"])
    def test_many_volumes_of_the_same_length(self, engine):
        # more than any cache of indices holds: none may be mistaken for another
        length = 120
        sizes = [(a, b, length // a // b) for a in range(1, 121) for b in range(1, 121) if length % (a * b) == 0]
        assert len(sizes) > 64
        tensors = arguments(1, 16, 2, length)
        tensors = {k: v.movedim(-1, 1) if v.ndim == 3 else v for k, v in tensors.items()}
        for order in ("hwd", "-dwh"):
            for size in sizes:
                options = {"order": order, "spatial_shape": size, "delta_softplus": True}
                y = selective_scan_channels_last(**tensors, **options, engine=engine)
                walked = {k: self.sequence(v, order, size) if v.ndim == 3 else v for k, v in tensors.items()}
                expected = selective_scan_channels_last(**walked, delta_softplus=True, engine="chunked")
                torch.testing.assert_close(self.sequence(y, order, size), expected, rtol=1e-4, atol=1e-5)

    def test_shape_of_the_volume_is_checked(self):
        tensors = {k: v.movedim(-1, 1) if v.ndim == 3 else v for k, v in arguments(length=60).items()}
        with pytest.raises(ValueError, match="needs spatial_shape"):
            selective_scan_channels_last(**tensors, order="hwd")
        with pytest.raises(ValueError, match=r"\(3, 4, 6\) holds 72 voxels, the sequence 60"):
            selective_scan_channels_last(**tensors, order="hwd", spatial_shape=(3, 4, 6))
        with pytest.raises(ValueError, match="unknown scan order 'sideways'"):
            selective_scan_channels_last(**tensors, order="sideways", spatial_shape=(3, 4, 5))


class TestThreads:
    @pytest.fixture(autouse=True)
    def threads_of_before(self):
        before = torch.get_num_threads()
        yield
        torch.set_num_threads(before)

    @pytest.mark.parametrize("engine", NATIVE)
    @pytest.mark.parametrize("threads", [1, 2])
    def test_two_runs_are_equal_to_the_bit(self, engine, threads):
        torch.set_num_threads(threads)
        tensors = arguments(batch=2, d=96, n=16, length=300)
        first, second = (run(tensors, engine, delta_softplus=True) for _ in range(2))
        for name, t in first.items():
            assert torch.equal(second[name], t), name

    @pytest.mark.parametrize("engine", NATIVE)
    @pytest.mark.parametrize("d", [16, 96, 130])
    def test_one_thread_and_two_agree(self, engine, d):
        tensors, results = arguments(batch=1, d=d, n=16, length=200), []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run(tensors, engine, delta_softplus=True))
        assert_close(*results, 2e-6)

    @pytest.mark.parametrize("engine", NATIVE)
    def test_four_python_threads_at_once(self, engine):
        inputs = [arguments(batch=2, d=40, n=8, length=500, seed=seed) for seed in range(4)]
        expected = [run(tensors, engine, delta_softplus=True) for tensors in inputs]
        start, failures = threading.Barrier(4), []

        def work(i: int) -> None:
            try:
                start.wait()
                for _ in range(5):
                    result = run(inputs[i], engine, delta_softplus=True)
                    assert_close(result, expected[i], 2e-6)
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not failures, failures[0]


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps in tensors; those that NumPy keeps are seen by tracemalloc."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            self.storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        super().__init__(pack, lambda t: t)

    def __enter__(self) -> Kept:
        super().__enter__()
        return self

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


class TestMemory:
    LENGTH, D, N = 4096, 32, 16

    def leaves(self) -> dict[str, torch.Tensor]:
        return {k: v.requires_grad_() for k, v in arguments(1, self.D, self.N, self.LENGTH).items()}

    @pytest.fixture(params=["scan", "mixer"])
    def call(self, request):
        """Call an engine's scan or mixer on tensors that want gradients, as a network's parameters do."""
        if request.param == "scan":
            tensors, options = self.leaves(), {"delta_softplus": True}
            return lambda engine: selective_scan(**tensors, **options, engine=engine)
        tensors = {k: v.requires_grad_() for k, v in mixer_arguments(self.D, (16, 16, 16), 1).items()}
        options = {"orders": ("forward", "reverse", "hwd"), "spatial_shape": (16, 16, 16)}
        return lambda engine: oriented_mixer(**tensors, **options, engine=engine)

    @pytest.mark.parametrize("engine", NATIVE)
    def test_nothing_of_the_size_of_all_states_is_kept(self, engine):
        tensors = self.leaves()
        selective_scan(**tensors, delta_softplus=True, engine=engine)  # caches are filled
        tracemalloc.start()
        with Kept() as kept:
            y = selective_scan(**tensors, delta_softplus=True, engine=engine)
        arrays = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        states = 4 * self.LENGTH * self.D * self.N
        assert kept.bytes + arrays < 0.75 * states, f"{kept.bytes} bytes in tensors, {arrays} in arrays"
        del y

    def test_the_measure_sees_what_the_reference_keeps(self):
        tensors = self.leaves()
        with Kept() as kept:
            selective_scan(**tensors, delta_softplus=True, engine="reference")
        assert kept.bytes > 4 * self.LENGTH * self.D * self.N

    @pytest.mark.parametrize("engine", NATIVE)
    def test_backward_frees_what_forward_has_kept(self, engine, call):
        # the loss lives on, as it does in a training loop until the next one takes its name
        call(engine).sum().backward()  # caches are filled, and the leaves have gradients
        tracemalloc.start()
        loss = call(engine).sum()
        kept = tracemalloc.get_traced_memory()[0]
        loss.backward()
        left = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert left < max(0.1 * kept, 2**16), f"{left} of {kept} bytes are left"

    @pytest.mark.parametrize("engine", NATIVE)
    def test_without_gradients_nothing_is_kept_for_backward(self, engine, call):
        peaks = []
        for enabled in (True, True, False):
            tracemalloc.start()
            with torch.set_grad_enabled(enabled):
                call(engine)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert peaks[2] < max(0.9 * peaks[1], 2**16), f"peak {peaks[2]} bytes, {peaks[1]} with gradients"


class TestMisuse:
    @pytest.mark.parametrize("engine", ENGINES)
    def test_an_input_changed_before_backward_is_noticed(self, engine):
        leaf = torch.rand(1, 16, 40, requires_grad=True)
        u = leaf * 1
        tensors = {**arguments(1, 16, 4, 40), "u": u}
        tensors["delta"].requires_grad_()
        y = selective_scan(**tensors, delta_softplus=True, engine=engine)
        with torch.no_grad():
            u.mul_(100)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    @pytest.mark.parametrize("engine", FAST)
    def test_a_second_derivative_is_refused_not_wrong(self, engine):
        u = torch.rand(1, 16, 40, requires_grad=True)
        tensors = {**arguments(1, 16, 4, 40), "u": u}
        y = selective_scan(**tensors, delta_softplus=True, engine=engine)
        with pytest.raises(RuntimeError):
            (gradient,) = torch.autograd.grad(y.square().sum(), u, create_graph=True)
            (gradient * u).sum().backward()

    @pytest.mark.parametrize("engine", ENGINES)
    def test_inputs_are_left_as_they_were(self, engine):
        tensors = arguments(length=steps(engine, 90))
        before = {k: v.clone() for k, v in tensors.items()}
        leaves = {k: v.requires_grad_() for k, v in tensors.items()}
        selective_scan(**leaves, delta_softplus=True, engine=engine).sum().backward()
        assert all(torch.equal(leaves[k], v) for k, v in before.items())

    @pytest.mark.parametrize(
        "name, shape, message",
        [
            ("u", (2, 16), r"u must be \(batch, d, L\)"),
            ("delta", (2, 16, 64), "delta must have shape"),
            ("delta", (2, 15, 65), "delta must have shape"),
            ("A", (15, 4), "A must have shape"),
            ("A", (16,), r"\bA\b.* real"),
            ("B", (2, 5, 65), "B must be"),
            ("B", (2, 4, 64), "B must be"),
            ("C", (1, 4, 65), "C must be"),
            ("B", (2, 3, 4, 65), "groups dividing d"),
            ("D", (15,), "D must have shape"),
            ("D", (16, 1), "D must have shape"),
            ("z", (2, 16, 1), "z must have shape"),
            ("delta_bias", (4,), "delta_bias must have shape"),
        ],
    )
    def test_shapes_that_do_not_fit(self, name, shape, message):
        with pytest.raises(ValueError, match=message):
            selective_scan(**{**arguments(), name: torch.rand(shape)})

    def test_complex_A(self):
        tensors = arguments()
        with pytest.raises(ValueError, match="real"):
            selective_scan(**{**tensors, "A": tensors["A"].to(torch.complex64)})

    @pytest.mark.parametrize("empty", [{"length": 0}, {"batch": 0}, {"n": 0}])
    def test_nothing_to_scan(self, empty):
        with pytest.raises(ValueError, match="nothing to scan"):
            selective_scan(**arguments(**empty))

    def test_nothing_to_mix(self):
        for name, width in (("A", 0), ("conv_weight", 0)):
            tensors = mixer_arguments()
            tensors[name] = tensors[name][..., :width]
            with pytest.raises(ValueError, match="nothing to scan"):
                oriented_mixer(**tensors, orders=("forward", "reverse", "hwd"), spatial_shape=(3, 5, 7))


class TestMambaSSM:
    """The shapes and values that mamba-ssm's own tests draw, through our operation."""

    @staticmethod
    def draw(length: int, groups: int | None, dtype: torch.dtype, has: tuple[bool, bool, bool], seed: int) -> dict:
        torch.manual_seed(seed)
        batch, d, n = 2, 4, 8
        BC = (batch, n, length) if groups is None else (batch, groups, n, length)
        return {
            "A": -0.5 * torch.rand(d, n),
            "B": torch.randn(BC).to(dtype),
            "C": torch.randn(BC).to(dtype),
            "D": torch.randn(d) if has[0] else None,
            "z": torch.randn(batch, d, length).to(dtype) if has[1] else None,
            "delta_bias": 0.5 * torch.rand(d) if has[2] else None,
            "u": torch.randn(batch, d, length).to(dtype),
            "delta": (0.5 * torch.rand(batch, d, length)).to(dtype),
        }

    CASES = [
        (128, 1, (True, True, True), True, torch.float32),
        (256, 2, (True, True, True), True, torch.float32),
        (512, None, (False, True, False), False, torch.float32),
        (1024, 1, (True, False, True), True, torch.float32),
        (256, 2, (False, False, False), True, torch.float32),
        (128, 1, (False, False, True), False, torch.float32),
        (1024, 2, (True, True, True), True, torch.float16),
        (256, 1, (True, False, False), True, torch.float16),
        (512, 2, (True, True, True), False, torch.bfloat16),
        (128, 1, (False, True, True), True, torch.bfloat16),
    ]
    RELATIVE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

    def compare(self, theirs, engine, length, groups, has, softplus, dtype) -> None:
        tensors = self.draw(length, groups, dtype, has, seed=length)

        def through(function, **options) -> dict:
            leaves = {k: None if v is None else v.clone().requires_grad_() for k, v in tensors.items()}
            y, state = function(**leaves, delta_softplus=softplus, return_last_state=True, **options)
            g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            y.backward(g)
            assert y.dtype == dtype
            return {"y": y, "state": state, **{k: v.grad for k, v in leaves.items() if v is not None}}

        # both compute in float32, so that the one's rounding adds to the other's
        assert_close(through(selective_scan, engine=engine), through(theirs), 2 * self.RELATIVE[dtype])

    @pytest.mark.parametrize(
        "engine, length, groups, has, softplus, dtype",
        [(e, *case) for case in CASES for e in ENGINES if e != "triton"],
    )
    def test_against_the_documented_formula(self, engine, length, groups, has, softplus, dtype):
        self.compare(formula, engine, length, groups, has, softplus, dtype)

    @pytest.mark.parametrize(
        "engine, length, groups, has, softplus, dtype",
        [(e, *case) for case in CASES for e in ENGINES if e != "triton"]
        + [("triton", 20, *case[1:]) for case in CASES if "triton" in ENGINES and case[0] == 128],
    )
    def test_against_the_package(self, engine, length, groups, has, softplus, dtype, selective_scan_ref):
        self.compare(selective_scan_ref, engine, length, groups, has, softplus, dtype)

    @pytest.fixture
    def selective_scan_ref(self, monkeypatch):
        """The yardstick in ``mamba-ssm`` itself, which needs none of what the package asks for when imported whole."""
        spec = importlib.util.find_spec("mamba_ssm")
        if spec is None or importlib.util.find_spec("triton") is None:
            pytest.skip("mamba-ssm or Triton, which it imports, is not installed (make test installs both)")
        package, kernels = types.ModuleType("mamba_ssm"), types.ModuleType("selective_scan_cuda")
        package.__path__ = list(spec.submodule_search_locations)
        monkeypatch.setitem(sys.modules, "mamba_ssm", package)
        monkeypatch.setitem(sys.modules, "selective_scan_cuda", kernels)
        yield importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_ref
        for name in [name for name in sys.modules if name.startswith("mamba_ssm.")]:
            del sys.modules[name]

    def test_arguments_stand_in_the_order_of_mamba_ssm(self):
        t = arguments()
        positional = [t[k] for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
        y, state = selective_scan(*positional, True, True)
        assert torch.equal(y, selective_scan(**t, delta_softplus=True))
        assert state.shape == (2, 16, 4)


def mixer_arguments(d: int = 32, size: tuple[int, int, int] = (3, 5, 7), batch: int = 2) -> dict:
    """Arguments of ``oriented_mixer`` for three orders, d / 2 channels, d_state 5, dt_rank 2 and 4 taps."""
    g = torch.Generator().manual_seed(4)
    shapes = {
        "tokens": (batch, size[0] * size[1] * size[2], d // 2),
        "in_proj_weight": (2 * d, d // 2),
        "conv_weight": (3, d, 4),
        "conv_bias": (3, d),
        "x_proj_weight": (3, 12, d),
        "dt_proj_weight": (3, d, 2),
        "dt_proj_bias": (3, d),
        "A": (3, d, 5),
        "D": (3, d),
    }
    tensors = {name: torch.randn(shape, generator=g) * 0.4 for name, shape in shapes.items()}
    tensors["A"] = -tensors["A"].abs() - 0.1
    return tensors


def run_mixer(tensors: dict, engine: str, size: tuple[int, int, int] = (3, 5, 7)) -> dict[str, torch.Tensor]:
    leaves = {k: v.clone().requires_grad_() for k, v in tensors.items()}
    y = oriented_mixer(**leaves, orders=("forward", "reverse", "hwd"), spatial_shape=size, engine=engine)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    with torch.no_grad():
        inference = oriented_mixer(**tensors, orders=("forward", "reverse", "hwd"), spatial_shape=size, engine=engine)
    return {"y": y.detach(), "inference": inference, **{k: v.grad for k, v in leaves.items()}}


@pytest.mark.parametrize("engine", FAST)
def test_mixer_takes_parameters_that_are_not_contiguous(engine):
    size = (2, 4, 3)
    tensors = mixer_arguments(size=size)
    strided = {k: torch.stack([t, t + 9], dim=-1)[..., 0] if k != "tokens" else t for k, t in tensors.items()}
    assert not strided["conv_bias"].is_contiguous()
    options = {"orders": ("forward", "reverse", "hwd"), "spatial_shape": size, "engine": engine}
    torch.testing.assert_close(oriented_mixer(**strided, **options), oriented_mixer(**tensors, **options))


MIXERS = product(NATIVE, [32, 48, 20], [(3, 5, 7), (1, 1, 2), (13, 5, 2)])


@pytest.mark.parametrize(
    "engine, d, size", [*MIXERS, *product(["triton"] if "triton" in FAST else [], [20], [(3, 2, 3), (1, 1, 2)])]
)
def test_mixer_of_every_engine_agrees_with_the_reference(engine, d, size):
    tensors = mixer_arguments(d, size)
    assert_close(run_mixer(tensors, engine, size), run_mixer(tensors, "reference", size), 2e-5)


@pytest.mark.skipif(AVAILABLE["numba"] is not None, reason=str(AVAILABLE["numba"]))
class TestUninitialisedMemory:
    """Memory that was never written holds NaN, or large numbers, here: whoever reads it shows it."""

    @pytest.fixture
    def poisoned(self, monkeypatch):
        from scripts.selective_scan import numba as engine

        calls = []

        def poison(array: np.ndarray) -> np.ndarray:
            calls.append(array.size)
            if array.dtype.kind == "f":
                array.fill(np.nan)
            return array

        proxy = SimpleNamespace(**{name: getattr(np, name) for name in dir(np) if not name.startswith("__")})
        proxy.empty = lambda *args, **kwargs: poison(np.empty(*args, **kwargs))
        proxy.empty_like = lambda *args, **kwargs: poison(np.empty_like(*args, **kwargs))
        monkeypatch.setattr(engine, "np", proxy)
        yield calls
        assert any(calls), "nothing was poisoned"

    @pytest.mark.parametrize(
        "d, n, groups, length", [(16, 4, None, 65), (40, 16, 2, 64), (130, 24, 1, 3), (4, 1, 2, 1)]
    )
    def test_scan(self, poisoned, d, n, groups, length):
        check("numba", arguments(2, d, n, length, groups), delta_softplus=True)

    @pytest.mark.parametrize("size", [(3, 5, 7), (1, 1, 2), (1, 8, 8)], ids=str)
    def test_mixer(self, poisoned, size):
        tensors = mixer_arguments(size=size)
        assert_close(run_mixer(tensors, "numba", size), run_mixer(tensors, "reference", size), 2e-5)

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="MALLOC_PERTURB_ is glibc's")
    def test_memory_that_the_kernels_allocate(self, tmp_path):
        code = (
            "import sys, torch; import tests.test_selective_scan as t\n"
            "a = [t.run(t.arguments(2, 40, 5, 70, 2), 'numba', delta_softplus=True),"
            " t.run(t.arguments(1, 16, 16, 3), 'numba'), t.run_mixer(t.mixer_arguments(48), 'numba')]\n"
            "torch.save(a, sys.argv[1])"
        )
        results = []
        for perturb in ("0", "128"):  # fills what malloc gives with 0x7f: floats of 3.4e38
            path = tmp_path / f"{perturb}.pt"
            environment = {**os.environ, "MALLOC_PERTURB_": perturb}
            root = Path(__file__).resolve().parents[1]
            subprocess.run([sys.executable, "-c", code, str(path)], cwd=root, env=environment, check=True, timeout=300)
            results.append(torch.load(path, weights_only=True))
        for plain, perturbed in zip(*results, strict=True):
            assert_close(perturbed, plain, 0)
