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

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from monai.networks.nets import SwinUNETR

from scripts.host_memory import retain_freed_memory
from scripts.segresmamba import SegResMamba
from scripts.selective_scan import selective_scan_channels_last

from .measuring import file_name, interleaved, processor, versions, write_results

__all__ = ["cpu", "training_memory"]

_TEXT: dict[str, Any] = {"depths": (1, 1, 1, 1), "stage_conv": False}  # the network of the paper's text
_COMPACT: dict[str, Any] = {**_TEXT, "channels": (16, 32, 64, 128), "out_channels": 3}


def cpu(rounds: int = 3, output_dir: str = "docs/benchmarks", name: str = "") -> None:
    """
    What the scan engines and SegResMamba cost on this CPU, and against what. Everything that is compared runs in turn,
    round by round; the medians and their ratios are what counts.

    Args:
        rounds: timed runs of each row after one warm-up (the token loop, which takes longest, is timed twice).
        output_dir: where ``cpu-<name>.json`` and ``.md`` are written.
        name: name of the machine in the files' names; default: its processor's.
    """
    retain_freed_memory()  # as the configs do
    torch.manual_seed(0)
    results = {
        "machine": {"processor": processor(), **versions()},
        "scan": _scan(rounds),
        "inference": _inference(rounds),
        "training": _training(rounds),
        "training_memory": _training_memory_apart(),
    }
    write_results(results, _markdown(results), f"cpu-{name or file_name(results['machine']['processor'])}", output_dir)


def training_memory(spatial_size: int = 96, use_tom: bool = True) -> None:
    """
    Peak resident memory of one training step (forward, backward, optimizer) of the text variant at full width, printed
    as JSON in MiB. Run in a process of its own, since a peak cannot be reset.

    Args:
        spatial_size: voxels an axis of the cubic patch, batch 1.
        use_tom: with ToM.
    """
    import resource

    def peak() -> float:
        if os.path.exists("/proc/self/status"):  # ru_maxrss would begin at the parent's size
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2  # bytes on macOS

    network = SegResMamba(out_channels=2, use_tom=use_tom, **_TEXT)
    optimizer = torch.optim.AdamW(network.parameters())
    image = torch.rand(1, 1, *(spatial_size,) * 3)
    before = peak()
    network(image).square().mean().backward()
    optimizer.step()
    print(json.dumps({"before": round(before), "peak": round(peak())}))


def _scan(rounds: int) -> dict:
    """The op alone, at SegResMamba's first level for a 128^3 patch."""
    length, d, n = 262144, 96, 16
    inputs = {"u": torch.randn(1, length, d), "delta": torch.rand(1, length, d) * 0.1}
    inputs["A"] = -torch.arange(1.0, n + 1).repeat(d, 1)
    inputs |= {"B": torch.randn(1, length, n), "C": torch.randn(1, length, n)}
    with_grad = {key: x.clone().requires_grad_() for key, x in inputs.items()}
    scan: Any = selective_scan_channels_last

    def forward(engine: str) -> Callable[[], object]:
        def run() -> None:
            with torch.inference_mode():
                scan(**inputs, engine=engine)

        return run

    def both() -> None:
        torch.autograd.grad(scan(**with_grad, engine="numba").sum(), list(with_grad.values()))

    functions = {f"{engine} forward": forward(engine) for engine in ("numba", "chunked", "reference")}
    functions["numba forward + backward"] = both
    return interleaved("scan", functions, rounds, few=("reference forward",))


def _inference(rounds: int) -> dict:
    """Whole networks, 1 to 14 classes, one 128^3 patch."""
    networks = {
        "SegResMamba (text)": SegResMamba(out_channels=14, **_TEXT),
        "SegResMamba (text) without ToM": SegResMamba(out_channels=14, use_tom=False, **_TEXT),
        "SegResMamba (tables)": SegResMamba(out_channels=14),
        "SwinUNETR (48)": SwinUNETR(in_channels=1, out_channels=14, feature_size=48),
    }
    image = torch.rand(1, 1, 128, 128, 128)

    def run(network: torch.nn.Module) -> Callable[[], object]:
        def forward() -> None:
            with torch.inference_mode():
                network(image)

        return forward

    return interleaved("inference", {key: run(x.eval()) for key, x in networks.items()}, rounds)


def _training(rounds: int) -> dict:
    """Forward and backward of the compact text variant, batch 2, 48 x 64 x 48."""
    networks = {"compact": SegResMamba(**_COMPACT), "compact without ToM": SegResMamba(use_tom=False, **_COMPACT)}
    image = torch.rand(2, 1, 48, 64, 48)

    def run(network: torch.nn.Module, dtype: torch.dtype | None) -> Callable[[], object]:
        def step() -> None:
            network.zero_grad()
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                logits = network(image)
            logits.float().square().mean().backward()

        return step

    functions = {key: run(network, None) for key, network in networks.items()}
    functions |= {f"{key}, bf16": run(network, torch.bfloat16) for key, network in networks.items()}
    return interleaved("training step", functions, 8 * rounds)


def _training_memory_apart() -> dict:
    """``training_memory`` with and without ToM, each in a process of its own."""
    results = {}
    for label, options in (("with ToM", []), ("without ToM", ["--use_tom", "False"])):
        command = [sys.executable, "-m", "scripts.benchmark", "training_memory", *options]
        results[label] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return results


def _markdown(results: dict) -> str:
    machine = results["machine"]
    scan, inference, training = results["scan"], results["inference"], results["training"]

    def ratio(table: dict, a: str, b: str) -> str:
        return f"{table[a]['median'] / table[b]['median']:.2f}"

    versions = ", ".join(f"{key} {machine[key]}" for key in ("python", "torch", "numba") if key in machine)
    head = f"{machine['processor']}, {machine['threads']} threads, {machine['capability']}, {machine['system']}"
    lines = [f"Measured on {head}, {versions}."]
    for title, table in (
        ("Selective scan, L 262,144 x d 96 x n 16, float32", scan),
        ("Inference, one 128 x 128 x 128 patch, 1 to 14 classes, float32", inference),
        ("Training step (forward and backward), channels 16 to 128, batch 2, 48 x 64 x 48", training),
    ):
        lines += ["", f"**{title}**", "", "| | median s | least | most | runs |", "| --- | --- | --- | --- | --- |"]
        lines += [
            f"| {key} | {row['median']:.3f} | {row['min']:.3f} | {row['max']:.3f} | {row['runs']} |"
            for key, row in table.items()
        ]
    lines += ["", "**Ratios of medians**", "", "| | |", "| --- | --- |"]
    for label, table, a, b in (
        ("token loop / numba, forward", scan, "reference forward", "numba forward"),
        ("chunked / numba, forward", scan, "chunked forward", "numba forward"),
        ("SegResMamba / without ToM, inference", inference, "SegResMamba (text)", "SegResMamba (text) without ToM"),
        ("SwinUNETR(48) / SegResMamba (text), inference", inference, "SwinUNETR (48)", "SegResMamba (text)"),
        ("SwinUNETR(48) / SegResMamba (tables), inference", inference, "SwinUNETR (48)", "SegResMamba (tables)"),
        ("with / without ToM, training step", training, "compact", "compact without ToM"),
        ("with / without ToM, training step, bf16", training, "compact, bf16", "compact without ToM, bf16"),
        ("float32 / bf16, training step", training, "compact", "compact, bf16"),
    ):
        lines.append(f"| {label} | {ratio(table, a, b)} |")
    lines += ["", "**Peak resident memory of one training step, text variant, 96 x 96 x 96, batch 1, float32**", ""]
    lines += ["| | before the step | peak |", "| --- | --- | --- |"]
    for label, row in results["training_memory"].items():
        lines.append(f"| {label} | {row['before']:,} MiB | {row['peak']:,} MiB |")
    return "\n".join(lines) + "\n"
