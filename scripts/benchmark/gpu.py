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

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch

from scripts.output import markdown_table
from scripts.selective_scan import available_engines, selective_scan_channels_last
from scripts.tri_orientated_mamba import ToM

from .composed import ComposedToM, causal_convolution
from .measuring import (
    describe,
    file_name,
    interleaved,
    machine,
    pick_device,
    release_memory,
    wall_clock,
    write_results,
)
from .networks import build_network
from .papers import load_papers
from .steps import inference_step, training_step

__all__ = ["gpu"]

_ENGINES = ("triton", "mamba_ssm", "chunked")
_SHAPES = [(1, (64, 64, 64), 96), (1, (32, 32, 32), 192), (1, (16, 16, 16), 384), (1, (8, 8, 8), 768)]
_SHAPES += [(2, (48, 48, 48), 96)]
_STATES = 16
_NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {  # overlay in configs/networks, and keys of its own
    "SegResMamba (tables)": ("segresmamba_tables", {}),
    "SegResMamba (text)": ("segresmamba_text", {}),
    "SegMamba": ("segmamba", {}),
    "SwinUNETR (48)": ("swin_unetr", {}),
    "SwinUNETR (48), checkpointing": ("swin_unetr", {"use_checkpoint": True}),
    "UNETR (16)": ("unetr", {}),
    "UNet (16 to 256)": ("unet", {}),
    "SegResNet (16)": ("segresnet", {}),
    "DynUNet (nnU-Net)": ("dynunet", {}),
}
_TINY_NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    key: (_NETWORKS[key][0], {"channels": [8, 16], "depths": [1, 1]})
    for key in ("SegResMamba (tables)", "SegResMamba (text)")
}
_HEAD_START = 10_000_000  # clocks, some 5 ms, that a GPU idles while its work is launched
_SFU_LANES = 16  # exponentials a multiprocessor finishes in a clock, from compute capability 7.0 on


def gpu(
    rounds: int = 30,
    output_dir: str = "docs/benchmarks",
    name: str = "",
    device: str = "cuda",
    tiny: bool = False,
) -> None:
    """
    What the scan engines, a ToM and whole networks cost on a GPU, side by side: the op alone at ToM's shapes, ToM on
    each engine, SegResMamba against MONAI's networks under autocast. Medians of calls in turn, timed by CUDA events,
    the op's inputs rotated past the L2 cache. What fails, most often for want of memory, is said to and left out; what
    has been measured is written at once.

    Args:
        rounds: timed calls of each row of the op and of ToM; a network is timed a third as often.
        output_dir: where ``gpu-<name>.json`` and ``.md`` are written.
        name: name of the machine in the files' names; default: its GPU's.
        device: ``"cuda"``; on ``"cpu"`` with ``tiny`` the script itself can be tried.
        tiny: sizes of a few voxels, whose figures mean nothing.

    Raises:
        ValueError: when there is no such device.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"no CUDA device is here, so nothing can be measured on {device!r}.")
    if pick_device(device) != "cpu":
        torch.cuda.set_device(torch.device(device).index or 0)  # events and the allocator are the current device's
    torch.manual_seed(0)
    bench = _Bench(torch.device(device), rounds, tiny)
    results: dict[str, Any] = {"machine": bench.machine, "ceilings": bench.ceilings()}
    results |= {"causal convolution": causal_convolution()[0], "seconds": 0.0, "scan": [], "tom": [], "networks": []}
    # cuBLAS keeps its workspaces, a thread each: else the first network's peak would hold them.
    training_step(torch.nn.Linear(64, 64).to(device), torch.rand(64, 64, device=device), bench.half)
    start, file = time.perf_counter(), f"gpu-{name or file_name(results['machine']['name'])}"
    for part in ("networks", "tom", "scan"):
        for rows in getattr(bench, part)():
            results |= {part: rows, "seconds": round(time.perf_counter() - start, 1)}
            write_results(results, _markdown(results), file, output_dir, quiet=True)
    write_results(results, _markdown(results), file, output_dir)


class _Bench:
    def __init__(self, device: torch.device, rounds: int, tiny: bool) -> None:
        self.device, self.rounds, self.tiny = device, rounds, tiny
        self.cuda = device.type == "cuda"
        self.engines = [e for e in _ENGINES if available_engines(device)[e] is None and (self.cuda or e != "triton")]

    @cached_property
    def machine(self) -> dict[str, str | int]:
        return machine(self.device)

    def ceilings(self) -> dict[str, float]:
        """Bytes a second that a copy moves, measured; exponentials a second, by the largest clock."""
        if not self.cuda:
            return {}
        source = torch.empty(2**28, device=self.device)
        target = torch.empty_like(source)
        seconds = self.time("copy", {"copy": lambda: target.copy_(source)}, self.rounds)["copy"]["median"]
        ceilings = {"bytes": 2 * source.nbytes / seconds}
        if (clock := self.machine.get("largest clock, MHz")) is not None:
            ceilings["exponentials"] = int(self.machine["multiprocessors"]) * _SFU_LANES * int(clock) * 1e6
        return ceilings

    def time(
        self,
        title: str,
        functions: Mapping[str, Callable[[], object]],
        rounds: int,
        ahead: bool = False,
        errors: dict[str, str] | None = None,
    ) -> dict:
        """``ahead``: without what the processor takes to launch, where the GPU would wait for it."""
        clock = partial(self._events, ahead=ahead) if self.cuda else wall_clock
        few = ["chunked"] if self.cuda else []  # a hundred times slower there
        return interleaved(title, functions, rounds, few, clock, errors)

    def _events(self, function: Callable[[], object], ahead: bool) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if ahead:
            torch.cuda._sleep(_HEAD_START)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def allocated(self) -> int:
        release_memory(self.device)
        return torch.cuda.memory_allocated() if self.cuda else 0

    def peak(self, function: Callable[[], object], before: int | None = None) -> int | None:
        """Bytes that are allocated at a call's peak beyond those ``before``, by default at its start."""
        if not self.cuda:
            return None
        before = self.allocated() if before is None else before
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def rotating(self, make: Callable[[], Any], bytes_: int) -> Callable[[], Any]:
        """Hands out one of several equal sets of inputs after the other, together three times the L2 cache."""
        l2 = torch.cuda.get_device_properties(self.device).L2_cache_size if self.cuda else 0
        sets = [make() for _ in range(max(1, min(64, -(-3 * l2 // bytes_))))]
        turn = iter(range(2**62))
        return lambda: sets[next(turn) % len(sets)]

    def scan(self) -> Iterator[list[dict]]:
        """The op alone, in raster order; the rows so far, as those of the parts below."""
        rows: list[dict] = []
        for batch, size, d in [(1, (2, 3, 4), 16)] if self.tiny else _SHAPES:
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                length = size[0] * size[1] * size[2]
                inputs = self.rotating(partial(self._scan_inputs, batch, length, d, dtype), 3 * batch * length * d * 2)
                row = {"batch": batch, "size": size, "d": d, "dtype": str(dtype).removeprefix("torch.")}
                forward = {e: partial(self._scan_forward, inputs, e) for e in self.engines}
                both = {e: partial(self._scan_both, inputs, e) for e in self.engines}
                title = f"scan {size[0]}^3 x {d} {row['dtype']}"
                row |= self._calls(title, {"forward": forward, "forward and backward": both})
                e = torch.empty((), dtype=dtype).element_size()
                row["bytes"] = batch * length * e * (3 * d + 2 * _STATES)
                row["exponentials"] = batch * length * d * _STATES
                rows.append(row)
                yield rows

    def _calls(self, title: str, calls: Mapping[str, Mapping[str, Callable[[], object]]]) -> dict[str, Any]:
        """Of the engines that did not fail, the times of each call and the peak of the last; the others' errors."""
        errors: dict[str, str] = {}
        row: dict[str, Any] = {}
        for name, functions in calls.items():
            left = {e: f for e, f in functions.items() if e not in errors}
            row[name] = self.time(f"{title}, {name}", left, self.rounds, ahead=True, errors=errors)
        row = {name: {e: timed[e] for e in timed if e not in errors} for name, timed in row.items()}
        return row | {"peak bytes": {e: self.peak(functions[e]) for e in row[name]}, "errors": errors}

    def _scan_inputs(self, batch: int, length: int, d: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        draw = partial(torch.randn, device=self.device)
        tensors = {"u": draw(batch, length, d), "delta": draw(batch, length, d) * 0.5 - 4}
        tensors |= {"B": draw(batch, length, _STATES), "C": draw(batch, length, _STATES)}
        tensors = {key: t.to(dtype) for key, t in tensors.items()}
        tensors["A"] = -torch.arange(1.0, _STATES + 1, device=self.device).repeat(d, 1)
        return {key: t.requires_grad_() for key, t in {**tensors, "D": draw(d), "delta_bias": draw(d)}.items()}

    @staticmethod
    def _scan_forward(inputs: Callable[[], dict], engine: str) -> None:
        with torch.inference_mode():
            selective_scan_channels_last(**inputs(), delta_softplus=True, engine=engine)

    @staticmethod
    def _scan_both(inputs: Callable[[], dict], engine: str) -> None:
        tensors = inputs()
        scan: Any = selective_scan_channels_last
        y = scan(**tensors, delta_softplus=True, engine=engine)
        torch.autograd.grad(y, list(tensors.values()), torch.ones_like(y))

    def tom(self) -> Iterator[list[dict]]:
        """One ToM under autocast; on ``mamba_ssm`` it is composed of that scan and copies, flipped or permuted."""
        rows: list[dict] = []
        for channels, size in ((8, (2, 3, 4)),) if self.tiny else ((48, (64, 64, 64)), (96, (32, 32, 32))):
            layers: dict[str, torch.nn.Module]
            layers = {e: ToM(channels, scan_engine=e).to(self.device) for e in self.engines}
            if "mamba_ssm" in layers:
                from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

                parameters = ToM(channels).to(self.device)
                layers["mamba_ssm"] = ComposedToM(parameters, selective_scan_fn, causal_convolution()[1])
            x = torch.randn(1, channels, *size, device=self.device)
            forward = {e: partial(inference_step, layer, x, self.half) for e, layer in layers.items()}
            train = {e: partial(training_step, layer, x, self.half) for e, layer in layers.items()}
            calls = self._calls(f"ToM {channels} x {size[0]}^3", {"forward": forward, "training": train})
            rows.append({"channels": channels, "size": size, **calls})
            yield rows

    @property
    def half(self) -> torch.dtype:
        """What autocast takes."""
        return torch.float16 if self.cuda else torch.bfloat16

    def networks(self) -> Iterator[list[dict]]:
        """Whole networks, batch 1, one after the other, since a GPU need not hold them all, nor any of them."""
        rows: list[dict] = []
        for side, classes in ((32, 2),) if self.tiny else ((128, 14), (96, 2)):
            x = torch.rand(1, 1, side, side, side, device=self.device)
            table: dict[str, dict] = {}
            rows.append({"size": side, "classes": classes, "networks": table})
            for label, (overlay, own) in (_TINY_NETWORKS if self.tiny else _NETWORKS).items():
                build = partial(build_network, overlay, 1, classes, (side,) * 3, overrides=own)
                table[label] = self._network(f"{label} {side}^3", build, x)
                yield rows

    def _network(self, title: str, build: Callable[..., torch.nn.Module], x: torch.Tensor) -> dict[str, Any]:
        """
        Its parameters; of inference and training the times and the peak, parameters and gradients among it, or why a
        step failed, most often for memory.
        """
        before = self.allocated()
        network = build().to(self.device)
        row: dict[str, Any] = {"parameters": sum(p.numel() for p in network.parameters())}
        for name, step in (("inference", inference_step), ("training", training_step)):
            network.train(name == "training").zero_grad(set_to_none=True)
            call = partial(step, network, x, self.half)
            errors: dict[str, str] = {}
            timed = self.time(f"{title}, {name}", {name: call}, max(1, self.rounds // 3), errors=errors)
            if errors:
                row[name] = {"error": errors[name]}
            else:
                row |= {name: timed[name], f"{name} peak bytes": self.peak(call, before)}
        return row


def _ratios(row: dict, engine: str, calls: Sequence[str]) -> str:
    """Of an engine's times, and peak, to triton's; empty where that was not measured."""
    if "triton" not in row[calls[0]]:
        return ""
    pairs = [(row[call][engine]["median"], row[call]["triton"]["median"]) for call in calls]
    if row["peak bytes"]["triton"]:
        pairs.append((row["peak bytes"][engine], row["peak bytes"]["triton"]))
    return ", ".join(f"{a / b:.2f}" for a, b in pairs)


def _shares(own: dict, other: dict) -> str:
    """Of a network's times, and peak, in another's; a dash where one of them failed."""
    pairs = [(own[key].get("median"), other[key].get("median")) for key in ("inference", "training")]
    peaks = (own.get("training peak bytes"), other.get("training peak bytes"))
    pairs += [peaks] if peaks != (None, None) else []
    return ", ".join(f"{a / b:.3f}" if a and b else "-" for a, b in pairs)


def _failed(error: str) -> str:
    return f"failed: {error.split('.')[0]}"


def _markdown(results: dict) -> str:
    ceilings = results["ceilings"]
    lines = [f"Measured on {describe(results['machine'])}."]
    if ceilings:
        lines[0] += f" Ceilings: a copy moves {ceilings['bytes'] / 1e9:.0f} GB/s (measured)"
        if "exponentials" in ceilings:
            lines[0] += f", {ceilings['exponentials'] / 1e12:.2f} T exponentials/s (by the largest clock)"
        lines[0] += "."

    def mib(value: int | None) -> str:
        return "" if value is None else f"{value / 2**20:,.0f}"

    def milli(row: dict) -> str:
        if "error" in row:
            return _failed(row["error"])
        return f"{row['median'] * 1e3:.3f} ({row['min'] * 1e3:.3f} to {row['max'] * 1e3:.3f})"

    lines += ["", "**Selective scan, n 16, raster order**", ""]
    head = ["shape", "dtype", "engine", "forward, ms", "forward and backward, ms", "peak, MiB", "of the nearer ceiling"]
    rows = []
    for row in results["scan"]:
        shape = f"({row['batch']}, {' x '.join(map(str, row['size']))}, {row['d']})"
        for engine, timed in row["forward"].items():
            share = ""
            if ceilings:
                least = max(row[what] / ceiling for what, ceiling in ceilings.items())
                share = f"{least / timed['median']:.0%}"
            both, peak = row["forward and backward"][engine], mib(row["peak bytes"][engine])
            cells = [shape, row["dtype"], engine, milli(timed), milli(both), peak, share]
            rows.append([*cells, _ratios(row, engine, ("forward", "forward and backward"))])
        rows += [[shape, row["dtype"], e, _failed(why), "", "", "", ""] for e, why in row.get("errors", {}).items()]
    lines.append(markdown_table([*head, "forward, both, peak / triton"], rows))
    lines += ["", "**ToM, batch 1, autocast**", ""]
    if any("mamba_ssm" in row["forward"] for row in results["tom"]):
        lines.append(
            f"On mamba_ssm: composed of its scan, the convolution of {results['causal convolution']}, and copies."
        )
        lines.append("")
    head = ["layer", "engine", "forward, ms", "training, ms", "peak, MiB", "forward, training, peak / triton"]
    rows = []
    for row in results["tom"]:
        layer = f"{row['channels']} channels, {' x '.join(map(str, row['size']))}"
        rows += [[layer, e, _failed(why), "", "", ""] for e, why in row.get("errors", {}).items()]
        for engine, timed in row["forward"].items():
            cells = [
                layer,
                engine,
                milli(timed),
                milli(row["training"][engine]),
                mib(row["peak bytes"][engine]),
                _ratios(row, engine, ("forward", "training")),
            ]
            rows.append(cells)
    lines.append(markdown_table(head, rows))
    for row in results["networks"]:
        lines += ["", f"**Networks, {row['size']}^3, 1 to {row['classes']} classes, batch 1, autocast**", ""]
        lines[-2] += " Of the peak are parameters, their gradients and activations; no optimizer is there."
        head = ["network", "parameters, M", "inference, ms", "training step, ms", "training peak, MiB"]
        head.append("SegResMamba (tables) / it: inference, training, training peak")
        rows = []
        for label, other in row["networks"].items():
            cells = [label, f"{other['parameters'] / 1e6:.2f}", milli(other["inference"]), milli(other["training"])]
            cells += [mib(other.get("training peak bytes")), _shares(row["networks"]["SegResMamba (tables)"], other)]
            rows.append(cells)
        lines.append(markdown_table(head, rows))
    papers = load_papers()["BTCV"]
    ours = papers["segresmamba_tables"]
    for overlay in ("swin_unetr", "segmamba") if results["networks"] else ():
        paper = [f"{key} {ours[key] / papers[overlay][key]:.3f}" for key in ("inference", "memory")]
        lines += ["", f"The paper's own ratios of SegResMamba to {overlay}, on an A100: {', '.join(paper)}."]
    return "\n".join(lines) + "\n"
