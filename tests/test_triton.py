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
"""
The ``triton`` engine beyond what every engine is asked for (test_selective_scan.py): its kernels compiled for GPUs
without one, its operators under torch.compile and torch.export, and, with a GPU, real shapes in all dtypes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from scripts.benchmark.steps import training_step
from scripts.phantom_volume import make_phantom
from scripts.segresmamba import SegResMamba
from scripts.selective_scan import available_engines, oriented_mixer, selective_scan, selective_scan_channels_last
from scripts.tri_orientated_mamba import TRI_ORIENTATED, ToM

triton = pytest.importorskip("triton", reason="Triton is not installed")
gpu = pytest.mark.gpu
SUITED = torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability() >= (7, 0)
needs_gpu = pytest.mark.skipif(not SUITED, reason="needs an NVIDIA GPU of compute capability 7.0 or newer")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the CPU interprets, see conftest.py

COMPILE = """
import inspect, itertools, json, sys
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from scripts.selective_scan import triton_mixer, triton_mixer_kernels, triton_scan, triton_scan_kernels

FLOAT = "weight bias A2 D sums starts gradients pieces dB dC dD dweight dbias".split()
WHOLE = "batch dy_rows R K L d g n chunks parts blocks taps elements b_columns c_columns".split()
ONES = "batch R K L g n chunks parts blocks dy_rows taps elements".split()
FLAGS = "SOFTPLUS GATED ORDERED WIDE ADD BACK".split()
CONSTANTS = {"N": 16, "taps": 4, "COUNT": 2, "n": 16, "b_columns": 40, "c_columns": 40}
MODULES = [triton_scan_kernels, triton_mixer_kernels]
KERNELS = {name: getattr(module, name) for module in MODULES for name in module.__all__}
TARGET = GPUTarget("cuda", int(sys.argv[1]), 32)

def source(name, dtype, flags):
    kernel, signature, constants = KERNELS[name], {}, {}
    walks = "N" in kernel.arg_names
    for parameter in kernel.params:
        argument = parameter.name
        if parameter.is_constexpr:
            signature[argument] = "constexpr"
            if name == "scan_gradients":
                tile = {"T": triton_scan._chunk(96), "W": triton_scan._CHANNELS, "P": triton_scan._PIECE}
            elif walks:
                tile = {"T": triton_scan._chunk(96), "W": triton_scan._LANES, "P": triton_scan._AHEAD}
                if dtype == "fp16" and name in ("chunk_ends", "scan_apply"):  # as of large volumes
                    tile |= {"b_columns": 16, "c_columns": 16}
            elif name in triton_scan_kernels.__all__:
                tile = {"T": triton_scan._CHUNKS, "W": triton_scan._ELEMENTS}
            else:
                tile = triton_mixer._TILE if "T" in kernel.arg_names else {"W": triton_mixer._GATE}
            constants[argument] = {**flags, **CONSTANTS, **tile}[argument]
            if argument == "n" and dtype == "fp32":
                constants[argument] = 40  # more states than a program holds
        elif (argument in ONES and dtype == "fp32") or (argument == "g" and dtype == "bf16"):  # as Triton a 1
            signature[argument], constants[argument] = "constexpr", 1
        elif argument in WHOLE:
            signature[argument] = "i64" if dtype == "fp16" and argument in ("L", "elements") else "i32"
        else:
            wide = argument in FLOAT or (walks and argument == "total")
            wide |= argument in ("B", "C") and constants.get("b_columns") == 16
            signature[argument] = "*fp32" if wide else "*" + dtype
            if argument in ("index", "inverse"):
                signature[argument] = "*i32"
    aligned = [k for k, (name_, kind) in enumerate(signature.items()) if kind[0] == "*" or name_ == "d"]
    attrs = {(k,): [["tt.divisibility", 16]] for k in aligned}  # as at a launch
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)

def options(name):
    chosen = {"num_warps": 1} if "N" in KERNELS[name].arg_names else {}
    return chosen | ({"maxnreg": triton_scan._REGISTERS} if name == "scan_gradients" else {})
"""

TO_THE_END = """
ONES.remove("L")  # walks over one step have no loop
done, crossing = [], []
for dtype in sys.argv[2:]:
    for name in KERNELS:
        flags = {flag: dtype == "fp16" or flag == "SOFTPLUS" for flag in FLAGS}
        compiled = triton.compile(source(name, dtype, flags), target=TARGET, options=options(name))
        assert compiled.asm["cubin"]
        done.append(name)
        walks = "N" in KERNELS[name].arg_names and name != "scan_gradients"
        if walks and ("shfl" in compiled.asm["ptx"] or compiled.metadata.shared):
            crossing.append(name)
print(json.dumps([done, crossing]))
"""

FRONT_END = """
backend, done = make_backend(TARGET), {}
for dtype in sys.argv[2:]:
    for name, kernel in KERNELS.items():
        free = [flag for flag in FLAGS if flag in kernel.arg_names]
        for values in itertools.product((False, True), repeat=len(free)):
            flags, context = dict(zip(free, values)), ir.context()
            parsed, code = backend.parse_options(options(name)), source(name, dtype, {"ORDERED": False, **flags})
            ir.load_dialects(context)
            backend.load_dialects(context)
            arguments = parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context
            takes_target = len(inspect.signature(code.make_ir).parameters) > len(arguments)  # of Triton 3.5 on
            try:
                code.make_ir(*([TARGET] if takes_target else []), *arguments)
            except Exception as error:
                raise SystemExit(f"{name} {dtype} {flags}: {error}")
            done[name] = done.get(name, 0) + 1
print(json.dumps(done))
"""


class TestWithoutAGPU:
    @pytest.mark.parametrize("capability", [70, 75, 80, 90, 120])
    def test_every_kernel_compiles(self, bundle_root, tmp_path, capability):
        """
        With 32-bit offsets and the raster order, or with 64-bit ones, an order and a gate; with sizes that are 1. In
        the walks over a chunk, but for the gradients' sums over channels, no value crosses lanes: their speed rests on
        it.
        """
        dtypes = {70: ["fp16"], 75: ["fp32"], 90: ["fp16", "bf16", "fp32"]}.get(capability, ["bf16"])
        done, crossing = self.compiled(TO_THE_END, bundle_root, tmp_path, capability, dtypes)
        assert done == [*self.kernels()] * len(dtypes) and not crossing

    def test_every_kernel_is_sound_with_every_flag(self, bundle_root, tmp_path):
        """As far as Triton's front end, where types that differ from turn to turn of a loop show."""
        done = self.compiled(FRONT_END, bundle_root, tmp_path, 90, ["fp16", "fp32"])
        assert list(done) == [*self.kernels()] and done["conv_backward_input"] == 2 * 2**3

    @staticmethod
    def kernels() -> list[str]:
        from scripts.selective_scan import triton_mixer_kernels, triton_scan_kernels

        return triton_scan_kernels.__all__ + triton_mixer_kernels.__all__

    @staticmethod
    def compiled(script: str, bundle_root: Path, tmp_path: Path, capability: int, dtypes: list[str]) -> Any:
        """What a script behind COMPILE prints, where Triton compiles and does not interpret."""
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(tmp_path)
        command = [sys.executable, "-c", COMPILE + script, str(capability), *dtypes]
        result = subprocess.run(command, cwd=bundle_root, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads(result.stdout)

    @pytest.fixture
    def engine(self, monkeypatch):
        """The operators' modules, with chunks and tiles of few steps: interpreted, a step takes milliseconds."""
        from scripts.selective_scan import triton_mixer, triton_scan

        monkeypatch.setattr(triton_scan, "_chunk", lambda d: 16)
        monkeypatch.setattr(triton_scan, "_CHUNKS", 2)
        monkeypatch.setitem(triton_mixer._TILE, "T", 16)
        return SimpleNamespace(mixer=triton_mixer, scan=triton_scan)

    @staticmethod
    def gradients(layer: ToM, x: torch.Tensor) -> list[torch.Tensor]:
        """Output, gradient of x and of every parameter."""
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        return [y.detach(), leaf.grad, *(p.grad for p in layer.parameters())]

    @pytest.fixture
    def launches(self, monkeypatch):
        """Of each launch, the kernel's name and, by program, the addresses that it loads and those that it stores."""
        from triton.runtime import interpreter

        builder, execute, launches = interpreter.interpreter_builder, interpreter.GridExecutor.__call__, []

        def launch(executor, *args, **kwargs):
            launches.append((executor.fn.__name__, {}))
            return execute(executor, *args, **kwargs)

        def noting(method, kind, mask_at):
            def access(*args):
                mask = np.broadcast_to(args[mask_at].data, args[0].data.shape).astype(bool)
                accesses = launches[-1][1].setdefault(builder.grid_idx, (set(), set()))
                accesses[kind].update(args[0].data[mask].tolist())
                return method(*args)

            return access

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
        monkeypatch.setattr(builder, "create_masked_load", noting(builder.create_masked_load, 0, 1))
        monkeypatch.setattr(builder, "create_masked_store", noting(builder.create_masked_store, 1, 2))
        return launches

    @pytest.mark.skipif(DEVICE == "cuda", reason="the kernels are not interpreted")
    @pytest.mark.parametrize("together", [0, 2**23])
    def test_no_program_touches_what_another_of_its_launch_writes(self, engine, monkeypatch, launches, together):
        """The interpreter takes one after the other, a GPU all at once. New memory holds NaN, to be written first."""
        monkeypatch.setattr(engine.mixer, "_TOGETHER", together)
        monkeypatch.setattr(engine.scan, "_PROGRAMS", 6)
        monkeypatch.setattr(engine.scan, "_RESIDENT", 2)
        layer = ToM(24, scan_engine="triton", d_state=20, orders=("forward", "-wdh"))
        with poisoned():
            results = self.gradients(layer, torch.randn(2, 24, 2, 3, 3))
        assert all(result.isfinite().all() for result in results)
        assert {name for name, _ in launches} == {*self.kernels()}
        for name, programs in launches:
            writer: dict[int, tuple[int, int, int]] = {}
            for program, (_, stored) in programs.items():
                assert stored.isdisjoint(writer), f"two programs of {name} store in one place"
                writer.update(dict.fromkeys(stored, program))
            for program, (loaded, _) in programs.items():
                assert {writer.get(address, program) for address in loaded} <= {program}, name

    @gpu
    def test_offsets_of_64_bits_give_the_same(self, engine, monkeypatch):
        layer, x = ToM(8, scan_engine="triton").to(DEVICE), torch.randn(1, 8, 2, 3, 4, device=DEVICE)
        narrow = self.gradients(layer, x)
        constants = engine.scan.shape_constants
        for module in (engine.scan, engine.mixer):
            monkeypatch.setattr(module, "shape_constants", lambda index, _: {**constants(index, 0), "WIDE": True})
        assert all(torch.equal(a, b) for a, b in zip(self.gradients(layer, x), narrow))

    @gpu
    @pytest.mark.parametrize(
        "batch, size, options",
        [
            (2, (3, 1, 7), {}),
            (1, (3, 1, 7), {"orders": ("reverse",)}),
            (1, (3, 1, 7), {"orders": ("forward", "-wdh"), "d_state": 20}),
        ],
    )
    def test_orders_one_after_the_other_give_the_same(self, engine, monkeypatch, batch, size, options):
        layer = ToM(8, scan_engine="triton", **options).to(DEVICE)
        with torch.no_grad():  # at the start A and D are the same for all orders
            for p in layer.parameters():
                p += 0.1 * torch.randn_like(p)
        x = torch.randn(batch, 8, *size, device=DEVICE)
        together = self.gradients(layer, x)
        monkeypatch.setattr(engine.mixer, "_TOGETHER", 0)
        for a, b in zip(self.gradients(layer, x), together):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()  # cuBLAS takes sums in another order for one matrix

    @gpu
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("groups", [None, 2])
    def test_B_and_C_in_float32_give_the_same(self, engine, monkeypatch, groups, dtype):
        g = torch.Generator().manual_seed(0)
        u, step, B, C = (torch.rand(2, 20, 16, generator=g).to(DEVICE, dtype) for _ in range(4))
        B, C = (x[..., :5] if groups is None else x.unflatten(2, (groups, -1))[..., :5] for x in (B, C))  # with gaps
        A = -torch.rand(16, 5, generator=g).to(DEVICE)
        expected = selective_scan_channels_last(u, step, A, B, C, engine="triton")
        monkeypatch.setattr(engine.scan, "_WIDEN", 0)
        ends, seen = engine.scan.kernels.chunk_ends, []

        class Spy:
            def __getitem__(self, grid):
                return lambda *args, **constants: (seen.append(args[4].dtype), ends[grid](*args, **constants))

        monkeypatch.setattr(engine.scan.kernels, "chunk_ends", Spy())
        assert torch.equal(selective_scan_channels_last(u, step, A, B, C, engine="triton"), expected)
        assert seen == [torch.float32]

    @gpu
    @pytest.mark.parametrize("together", [0, 2**23])
    def test_a_mixer_keeps_what_it_says(self, engine, monkeypatch, together):
        """In bytes a token, but for the orders' indices, which all layers of a size share."""
        monkeypatch.setattr(engine.mixer, "_TOGETHER", together)
        layer, (d, K, n) = ToM(8, scan_engine="triton").to(DEVICE), (16, 3, 16)
        parameters = [
            layer.in_proj.weight,
            layer.conv_weight,
            layer.conv_bias,
            layer.x_proj_weight,
            layer.dt_proj_weight,
            layer.dt_proj_bias,
        ]

        def kept(size: tuple[int, int, int]) -> int:
            tensors, tokens = {}, torch.randn(1, size[0] * size[1] * size[2], 8, device=DEVICE, requires_grad=True)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.setdefault(t.data_ptr(), t), lambda t: t):
                oriented_mixer(tokens, *parameters, -layer.A_log.exp(), layer.D, layer.orders, size, engine="triton")
            tensors.pop(tokens.data_ptr())
            return sum(t.numel() * t.element_size() for t in tensors.values() if t.is_floating_point())

        assert kept((2, 4, 4)) - kept((1, 4, 4)) == 16 * 4 * (2 * d + d) + 4 * K * n * d  # one chunk more

    @pytest.mark.skipif(DEVICE == "cuda", reason="the bench measures it there")
    def test_a_training_step_of_a_large_volume_allocates_little(self, monkeypatch, bundle_root):
        """
        What PyTorch allocates at its peak, the kernels left out, at the first level of a 128^3 patch, beside what the
        layer composed of mamba-ssm and copies took on an H100: at most 0.6, which ToM is to get to.
        """
        from scripts.selective_scan import triton_mixer, triton_scan

        class LeftOut:
            def __getattr__(self, name):
                return self

            def __getitem__(self, grid):
                return lambda *args, **constants: None

        for module in (triton_mixer, triton_scan):
            monkeypatch.setattr(module, "kernels", LeftOut())
        monkeypatch.setattr(triton_scan, "_multiprocessors", lambda device: 132)
        layer, x = ToM(48, scan_engine="triton"), torch.rand(1, 48, 64, 64, 64)
        training_step(layer, x, torch.bfloat16)  # the orders' indices stay
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            training_step(layer, x, torch.bfloat16)
        # profiler.events() gives allocations to the operators around them, without their times
        events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        allocated = np.cumsum([event.nbytes() for event in events if event.name() == "[memory]"])
        assert allocated[-1] == 0
        measured = json.loads((bundle_root / "docs/benchmarks/gpu-nvidia_h100_80gb_hbm3.json").read_text())["tom"][0]
        assert (measured["channels"], measured["size"]) == (48, [64, 64, 64])
        assert 0.4 < allocated.max() / measured["peak bytes"]["mamba_ssm"] < 0.6

    @gpu
    def test_sums_over_channels_in_one_part_or_in_many_agree(self, engine, monkeypatch):
        """And so do they in programs for each, or in few that take one after the other."""
        layer, x = ToM(24, scan_engine="triton").to(DEVICE), torch.randn(1, 24, 1, 3, 4, device=DEVICE)
        results = []
        for programs, resident in ((1, 1), (6, 2), (4096, 4096)):  # of 3 blocks of channels 1, 2 and 3 parts
            monkeypatch.setattr(engine.scan, "_PROGRAMS", programs)
            monkeypatch.setattr(engine.scan, "_RESIDENT", resident)
            results.append(self.gradients(layer, x))
        for some in results[1:]:
            for a, b in zip(some, results[0]):
                assert (a - b).abs().max() <= 1e-5 * b.abs().max()


class TestEngine:
    def test_of_devices_that_are_not_there(self):
        assert available_engines("mps")["triton"] is not None
        if not torch.cuda.is_available():
            assert "CUDA" in available_engines("cuda")["triton"]

    def test_other_makes_of_gpu_are_refused(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert available_engines("cuda")["triton"] == "it is written for NVIDIA's GPUs"

    def test_where_triton_cannot_start_auto_takes_another_and_says_so(self, monkeypatch, caplog):
        from scripts.selective_scan import engines

        class Driver:
            @property
            def active(self):
                raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        monkeypatch.setattr(triton.runtime, "driver", Driver())
        for function in (engines._missing, engines._log_choice, engines._log_fallback):
            function.cache_clear()
        try:
            for _ in range(2):
                chosen = engines.resolve_engine("auto", torch.device("cuda"), torch.float32)
            assert chosen.__name__.endswith(("chunked", "mamba_ssm"))
            lines = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
            assert len(lines) == 1 and "Failed to find C compiler" in lines[0]
        finally:
            for function in (engines._missing, engines._log_choice, engines._log_fallback):
                function.cache_clear()


@gpu
class TestCompilers:
    @pytest.fixture
    def layer(self) -> ToM:
        torch.manual_seed(0)
        return ToM(8, scan_engine="triton").to(DEVICE)

    @staticmethod
    def volume(batch: int = 1) -> torch.Tensor:
        return torch.randn(batch, 8, 2, 3, 4, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))

    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_gpu)])
    @pytest.mark.parametrize("half", [False, True])
    def test_compile_breaks_no_graph(self, layer, backend, half):
        torch.compiler.reset()
        results = []
        for function in (layer, torch.compile(layer, fullgraph=True, backend=backend)):
            layer.zero_grad()
            with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
                y = function(self.volume())
            y.float().square().sum().backward()
            results.append([y.detach(), *(p.grad.clone() for p in layer.parameters())])
        for compiled, expected in zip(results[1], results[0]):
            error = (compiled - expected).abs().max() / expected.abs().max()
            assert error <= (0.02 if half else 1e-5)

    def test_export_holds_the_operator(self, layer):
        program = torch.export.export(layer, (self.volume(),))
        assert "torch.ops.segresmamba.mixer" in str(program.graph_module.code)
        torch.testing.assert_close(program.module()(self.volume()), layer(self.volume()))

    def test_operators_keep_the_rules_of_torch_library(self):
        from scripts.selective_scan.triton_mixer import gate_operator, mixer_operator
        from scripts.selective_scan.triton_scan import scan_operator

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=DEVICE) * 0.3

        def wants_gradient(*tensors: torch.Tensor) -> list[torch.Tensor]:
            return [t.requires_grad_() for t in tensors]

        L, d, n, rank = 6, 4, 3, 2
        index = torch.randperm(L, device=DEVICE).to(torch.int32)[None]
        inverse = torch.empty_like(index).scatter_(1, index.long(), torch.arange(L, device=DEVICE).int()[None])
        tensors = wants_gradient(draw(2, L, d), draw(2, L, d), -draw(1, d, n).abs(), draw(2, L, 1, n))
        tensors += wants_gradient(draw(2, L, 1, n), draw(1, d), draw(2, L, d), draw(1, d))
        torch.library.opcheck(scan_operator, (*tensors, True, index))
        tensors[6] = None
        torch.library.opcheck(scan_operator, (*tensors, False, None))
        tensors = wants_gradient(draw(2, L, d), draw(1, 4, d), draw(1, d), draw(1, rank + 2 * n, d))
        tensors += wants_gradient(draw(1, d, rank), draw(1, d), -draw(1, d, n).abs(), draw(1, d))
        torch.library.opcheck(mixer_operator, (*tensors, index, inverse))
        torch.library.opcheck(gate_operator, tuple(wants_gradient(draw(2, L, d), draw(2, L, d))))


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that PyTorch hands out holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@gpu
@needs_gpu
class TestOnAGPU:
    SHAPES = [(1, (64, 64, 64), 96), (1, (32, 32, 32), 192), (1, (16, 16, 16), 384), (1, (8, 8, 8), 768)]
    SHAPES += [(2, (48, 48, 48), 96), (1, (37, 41, 29), 96), (3, (5, 7, 3), 40)]
    TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

    def test_auto_chooses_it(self):
        engines = available_engines("cuda")
        assert engines["triton"] is None, engines

    @staticmethod
    def scan(function, tensors: dict, **options) -> dict[str, torch.Tensor]:
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        y, state = function(**leaves, delta_softplus=True, return_last_state=True, **options)
        weight = torch.randn(y.shape, generator=torch.Generator("cuda").manual_seed(3), device="cuda")
        (y.float() * weight).sum().backward()
        return {"y": y.detach(), "state": state, **{name: t.grad for name, t in leaves.items()}}

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("order", ["forward", "reverse", "inter_slice", "-wdh"])
    @pytest.mark.parametrize("batch, size, d", SHAPES, ids=str)
    def test_real_shapes(self, batch, size, d, order, dtype):
        generator = torch.Generator("cuda").manual_seed(0)
        draw = partial(torch.randn, generator=generator, device="cuda")
        length, n = size[0] * size[1] * size[2], 16
        tensors = {"u": draw(batch, length, d), "delta": draw(batch, length, d) * 0.5 - 4}
        tensors |= {"B": draw(batch, length, n), "C": draw(batch, length, n), "z": draw(batch, length, d)}
        tensors = {name: t.to(dtype) for name, t in tensors.items()}
        tensors |= {"A": -torch.arange(1.0, n + 1, device="cuda").repeat(d, 1), "D": draw(d), "delta_bias": draw(d)}
        options = {"order": order, "spatial_shape": size}
        with poisoned():
            actual = self.scan(selective_scan_channels_last, tensors, engine="triton", **options)
        as_float = {name: t.float() for name, t in tensors.items()}
        expected = self.scan(selective_scan_channels_last, as_float, engine="chunked", **options)
        for name, e in expected.items():
            error = (actual[name].float() - e).abs().max() / e.abs().max()
            assert error <= self.TOLERANCE[dtype], f"{name}: {error:.1e}"

    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("length", [1, 17, 131])
    @pytest.mark.parametrize(
        "d, n, groups", [(40, 24, 2), (48, 3, 16), (6, 5, 2), (8, 1, 1), (40, 40, 1), (260, 16, 1)]
    )
    def test_odd_shapes(self, d, n, groups, length, gated):
        """Groups, more states than a program holds, numbers that fit no tile; one sequence, against the reference."""
        draw = partial(torch.randn, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
        tensors = {"u": draw(1, length, d), "delta": draw(1, length, d) - 2, "A": -draw(d, n).abs(), "D": draw(d)}
        tensors |= {"B": draw(1, length, groups, n), "C": draw(1, length, groups, n), "delta_bias": draw(d)}
        tensors |= {"z": draw(1, length, d)} if gated else {}
        with poisoned():
            actual = self.scan(selective_scan_channels_last, tensors, engine="triton")
        expected = self.scan(selective_scan_channels_last, tensors, engine="reference")
        for name, e in expected.items():
            error = (actual[name] - e).abs().max() / e.abs().max().clamp(min=1e-30)
            assert error <= self.TOLERANCE[torch.float32], f"{name}: {error:.1e}"

    @pytest.mark.parametrize("length", [17, 300])
    @pytest.mark.parametrize(
        "variant", ["no softplus", "no D", "no bias", "no z", "constant B", "constant C", "strided", "float16 u"]
    )
    def test_arguments(self, variant, length):
        """Of :py:func:`selective_scan`, channels first: those that may be absent, constant, strided or of one dtype."""
        draw = partial(torch.randn, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
        tensors = {"u": draw(2, 24, length), "delta": draw(2, 24, length).abs() / 8, "A": -draw(24, 16).abs()}
        tensors |= {"B": draw(2, 16, length), "C": draw(2, 16, length), "D": draw(24), "z": draw(2, 24, length)}
        tensors |= {"delta_bias": draw(24).abs() / 8}
        absent = {"no D": "D", "no bias": "delta_bias", "no z": "z"}.get(variant)
        tensors.pop(absent, None)
        if variant.startswith("constant"):
            tensors[variant[-1]] = draw(24, 16)
        if variant == "float16 u":
            tensors["u"] = tensors["u"].half()
        results = {}
        for engine in ("triton", "reference"):
            leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
            used = dict(leaves)
            if variant == "strided":
                used |= {name: leaves[name][..., ::3] for name in ("u", "delta", "B", "C", "z")}
            with poisoned() if engine == "triton" else nullcontext():
                y = selective_scan(**used, delta_softplus=variant != "no softplus", engine=engine)
                y.float().square().sum().backward()
            results[engine] = {"y": y.detach(), **{name: t.grad for name, t in leaves.items()}}
        for name, e in results["reference"].items():
            error = (results["triton"][name].float() - e.float()).abs().max() / e.abs().max()
            assert error <= self.TOLERANCE[tensors["u"].dtype], f"{name}: {error:.1e}"  # of which y is, too

    @pytest.mark.parametrize(
        "channels, size, orders",
        [
            (48, (64, 64, 64), TRI_ORIENTATED),
            (384, (8, 8, 8), TRI_ORIENTATED),
            (20, (13, 5, 7), TRI_ORIENTATED),
            (20, (13, 5, 7), ("forward",)),  # no index
        ],
        ids=str,
    )
    @pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("called", [False, True])
    def test_tom(self, channels, size, orders, dtype, called):
        """``called``: with a hook, so that in_proj makes x and z as one tensor."""
        torch.manual_seed(0)
        layers = {name: ToM(channels, orders, scan_engine=name).cuda() for name in ("triton", "chunked")}
        layers["chunked"].load_state_dict(layers["triton"].state_dict())
        if called:
            layers["triton"].in_proj.register_forward_hook(lambda *_: None)
        x, results = torch.randn(1, channels, *size, device="cuda"), {}
        for name, layer in layers.items():
            half = torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None and name == "triton")
            with poisoned() if name == "triton" else nullcontext():  # else sums by index become slow
                with half:
                    y = layer(x)
                (y.float().square().sum() / 8).backward()  # float16 has no numbers as small as a mean's gradients
            results[name] = {"y": y.detach(), **{key: p.grad for key, p in layer.named_parameters()}}
        for key, e in results["chunked"].items():
            error = (results["triton"][key].float() - e).abs().max() / e.abs().max()
            assert error <= 3 * self.TOLERANCE[dtype or torch.float32], f"{key}: {error:.1e}"

    @pytest.mark.skipif(available_engines("cuda")["mamba_ssm"] is not None, reason="no mamba-ssm with CUDA kernels")
    @pytest.mark.parametrize("order", ["forward", "reverse", "inter_slice"])
    def test_mamba_ssm_where_it_is_there(self, order):
        draw = partial(torch.randn, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
        tensors = {"u": draw(2, 60, 16), "delta": draw(2, 60, 16) - 2, "A": -draw(16, 8).abs(), "D": draw(16)}
        tensors |= {"B": draw(2, 60, 8), "C": draw(2, 60, 8), "z": draw(2, 60, 16), "delta_bias": draw(16)}
        options = {"order": order, "spatial_shape": (3, 4, 5)}
        actual = self.scan(selective_scan_channels_last, tensors, engine="mamba_ssm", **options)
        expected = self.scan(selective_scan_channels_last, tensors, engine="chunked", **options)
        for name, e in expected.items():
            assert (actual[name] - e).abs().max() <= 2e-5 * e.abs().max(), name

    def test_two_runs_are_equal_to_the_bit(self):
        torch.manual_seed(0)
        layer, x = ToM(48, scan_engine="triton").cuda(), torch.randn(1, 48, 64, 64, 32, device="cuda")
        results = []
        for _ in range(2):
            layer.zero_grad()
            layer(x).square().mean().backward()
            results.append([p.grad.clone() for name, p in layer.named_parameters() if "proj" not in name])
        assert all(torch.equal(a, b) for a, b in zip(*results))

    def test_nothing_of_the_size_of_all_states_is_kept(self):
        layer, x = ToM(48, scan_engine="triton").cuda(), torch.randn(1, 48, 64, 64, 64, device="cuda")
        before = torch.cuda.memory_allocated()
        y = layer(x)
        assert torch.cuda.memory_allocated() - before < 0.5 * 64**3 * 96 * 16 * 4
        del y

    def test_a_training_step_takes_little_memory(self, bundle_root):
        """At most 0.6 of what the layer composed of mamba-ssm and copies took on an H100."""
        measured = json.loads((bundle_root / "docs/benchmarks/gpu-nvidia_h100_80gb_hbm3.json").read_text())["tom"][0]
        layer, x = ToM(48, scan_engine="triton").cuda(), torch.rand(1, 48, 64, 64, 64, device="cuda")
        training_step(layer, x, torch.bfloat16)  # compiles; the orders' indices and cuBLAS's workspaces stay
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        training_step(layer, x, torch.bfloat16)
        assert torch.cuda.max_memory_allocated() - before < 0.6 * measured["peak bytes"]["mamba_ssm"]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("together", [0, 2**23])
    def test_a_network_trains_under_autocast_for_200_steps(self, phantom_batch, monkeypatch, dtype, together):
        from scripts.selective_scan import triton_mixer

        monkeypatch.setattr(triton_mixer, "_TOGETHER", together)
        torch.manual_seed(0)
        image, label = (t.cuda() for t in phantom_batch)
        network = SegResMamba(out_channels=int(label.max()) + 1, channels=(16, 32, 64), depths=(1, 1, 1)).cuda()
        optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        losses = []
        for _ in range(200):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype):
                loss = torch.nn.functional.cross_entropy(network(image).float(), label)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        assert all(torch.tensor(losses).isfinite())
        assert losses[-1] < 0.5 * losses[0]

    @pytest.fixture
    def phantom_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One synthetic volume as the bundle's phantoms are, (1, 1, 64, 64, 64), and its labels."""
        image, label, _ = make_phantom(0, spatial_size=(64, 64, 64))
        image = torch.as_tensor(image)[None, None].float()
        return (image - image.mean()) / image.std(), torch.as_tensor(label)[None].long()
