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

import ctypes
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from monai.losses import DiceLoss

from scripts.host_memory import retain_freed_memory

from .measuring import synchronize, wall_clock
from .networks import build_network
from .steps import inference_step, training_step

__all__ = ["apart", "run_apart"]

_NO_MEMORY = re.compile("out of memory|allocate memory|not enough memory|bad_alloc", re.IGNORECASE)


def apart(
    network: str,
    spatial_sizes: Sequence[Sequence[int]],
    in_channels: int = 1,
    out_channels: int = 2,
    steps: Sequence[str] = ("inference", "training"),
    rounds: int = 1,
    device: str = "cpu",
    precision: str = "fp32",
    memory_gb: float = 0.0,
    seconds: float = 0.0,
    overrides: Mapping[str, Any] | None = None,
) -> None:
    """
    Peak memory and time of one network, batch 1: inference at each size, then a training step (forward, Dice loss,
    backward, Adam) at each. Prints one line of JSON for each, and goes on to the next step with the first size that
    does not fit. Meant for a process of its own: on the CPU the peak is the largest resident size of the process so
    far, so with several sizes only one step tells.

    Args:
        network: overlay in configs/networks, by name.
        spatial_sizes: sizes (D, H, W), from the smallest to the largest.
        in_channels: channels of the input.
        out_channels: channels of the output.
        steps: of "inference" and "training".
        rounds: timed runs at each size, after one that is not timed; 0 for the peak alone.
        device: "cpu" or "cuda".
        precision: "fp32", or "bf16" or "fp16" by autocast.
        memory_gb: more than this many GB of host memory are refused (Linux); 0 for no limit.
        seconds: stop after a size whose first run took longer; 0 for no limit.
        overrides: further keys of the configs.
    """
    retain_freed_memory()  # as the configs do
    if memory_gb and device == "cpu" and sys.platform == "linux":
        import resource

        limit = int(memory_gb * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.manual_seed(0)
    dtype = None if precision == "fp32" else {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    sizes = [tuple(size) for size in spatial_sizes]
    for step in steps:
        for size in sizes:
            try:
                found: dict[str, Any] = _measure(
                    network, step, size, in_channels, out_channels, rounds, device, dtype, overrides
                )
            except (RuntimeError, MemoryError, ValueError) as error:  # torch says all three: no memory, no such size
                found = {"error": _reason(error)}
            print(json.dumps({"step": step, "spatial_size": size, **found}), flush=True)
            if "error" in found or (seconds and found["first"] > seconds):
                break


def _measure(name, step, size, in_channels, out_channels, rounds, device, dtype, overrides) -> dict[str, float]:
    network = build_network(name, in_channels, out_channels, size, overrides=overrides).to(device)
    image = torch.rand(1, in_channels, *size, device=device)
    _reset_peak(device)
    before = _peak(device)
    if step == "inference":
        network.eval()

        def function() -> None:
            inference_step(network, image, dtype)
    else:
        label = torch.randint(0, out_channels, (1, 1, *size), device=device)
        loss_function = DiceLoss(to_onehot_y=True, softmax=True)
        optimizer = torch.optim.Adam(network.parameters())

        def function() -> None:
            training_step(network, image, dtype, label, loss_function, optimizer)

    def call() -> None:
        function()
        synchronize(device)

    first = wall_clock(call)
    times = [wall_clock(call) for _ in range(rounds)]
    found = {"first": first, "before": before, "peak": _peak(device)}
    if times:
        found["seconds"] = statistics.median(times)
    return found


def _reset_peak(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _peak(device: str) -> float:
    """MiB: of CUDA's allocator, or the largest resident size of this process so far."""
    if device.startswith("cuda"):
        return round(torch.cuda.max_memory_allocated() / 2**20)
    if os.path.exists("/proc/self/status"):  # ru_maxrss would begin at the parent's size
        with open("/proc/self/status") as file:
            return round(next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024)
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)  # bytes on macOS


def _reason(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
        return "does not fit into memory"
    return f"does not take this size: {text.splitlines()[0]}"


def run_apart(network: str, **options: Any) -> Iterator[dict]:
    """
    :py:func:`apart` in a process of its own.

    Args:
        network: overlay in configs/networks, by name.
        **options: further arguments of :py:func:`apart`.

    Yields:
        what it prints, as it comes; an ``"error"`` where the process ended before its time.
    """
    command = [sys.executable, "-m", "scripts.benchmark", "apart", network]
    command += [
        f"--{key}={value!r}" if not isinstance(value, str) else f"--{key}={value}" for key, value in options.items()
    ]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            for line in process.stdout or ():
                if line.startswith("{"):
                    yield json.loads(line)
        errors.seek(0)
        lines = errors.read().strip().splitlines()
    if process.returncode:
        last = lines[-1] if lines else f"ended with {process.returncode}"
        killed = process.returncode in (-9, 137)
        reason = "does not fit into memory" if killed or _NO_MEMORY.search(last) else last
        yield {"step": "", "error": reason}
