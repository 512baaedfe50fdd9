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
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from scripts.complexity import flops
from scripts.host_memory import retain_freed_memory

from .measuring import peak_mib, release_memory, wall_clock
from .networks import build_network, first_cause
from .steps import DTYPES, make_step

__all__ = ["apart", "run_apart"]

_ROOT = Path(__file__).parents[2]
_NO_MEMORY = re.compile("out of memory|allocate memory|not enough memory|bad_alloc", re.IGNORECASE)
_DOES_NOT_FIT = "does not fit into memory"


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
    loss: str = "DiceLoss",
    batch_size: int = 1,
) -> None:
    """
    Peak memory and time of one network: inference at each size, then a training step (forward, loss,
    backward, Adam) at each. Prints one line of JSON for each, and goes on to the next step with the first size that
    cannot be measured. Meant for a process of its own: on the CPU the peak is the largest resident size of the process
    so far, so with several sizes only one step tells.

    Args:
        network: overlay in configs/networks, by name.
        spatial_sizes: sizes (D, H, W), from the smallest to the largest.
        in_channels: channels of the input.
        out_channels: channels of the output.
        steps: of "inference" and "training".
        rounds: timed runs at each size, after one that is not timed; 0 for the peak alone.
        device: "cpu" or "cuda".
        precision: "fp32", or "bf16" or "fp16" by autocast.
        memory_gb: more than this many GB of address space for data are refused (Linux, CPU); 0 for no limit.
        seconds: no larger size after one that took longer (the median); 0 for no limit.
        overrides: further keys of the configs.
        loss: class of monai.losses.
        batch_size: volumes at a time.
    """
    retain_freed_memory()  # as the configs do
    if memory_gb and device == "cpu" and sys.platform == "linux":
        import resource

        limit = int(memory_gb * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.manual_seed(0)
    release_memory(device)
    base = peak_mib(device)
    for step in steps:
        for k, size in enumerate(spatial_sizes):
            at = {"step": step, "spatial_size": list(size)}
            shape = (batch_size, in_channels, out_channels, list(size))
            try:
                found: dict[str, Any] = _measure(
                    network, step, shape, rounds, device, DTYPES[precision], overrides, loss
                )
            except (RuntimeError, MemoryError, ValueError) as error:
                found = {"error": _reason(error)}
            print(json.dumps(at | {"base_mib": base} | found), flush=True)
            if "error" in found:
                break
            taken = found.get("seconds", found["first"])
            if seconds and taken > seconds and k + 1 < len(spatial_sizes):
                at["spatial_size"] = list(spatial_sizes[k + 1])
                print(json.dumps({**at, "error": f"not tried, {taken:.1f} s before"}), flush=True)
                break


class _NotThisSize(ValueError):
    """A network refuses the size of a volume."""


def _measure(name, step, shape, rounds, device, dtype, overrides, loss) -> dict[str, float]:
    batch_size, in_channels, out_channels, size = shape
    try:
        flops(build_network(name, in_channels, out_channels, size, "meta", overrides), in_channels, size)
    except (RuntimeError, ValueError) as error:
        raise _NotThisSize(f"does not take this size: {first_cause(error)}") from error
    release_memory(device)
    network = build_network(name, in_channels, out_channels, size, overrides=overrides).to(device)
    image = torch.rand(batch_size, in_channels, *size, device=device)
    call = make_step(network, step, image, out_channels, dtype, loss)
    first = wall_clock(call)
    times = [wall_clock(call) for _ in range(rounds)]
    found = {"first": first, "peak_mib": peak_mib(device)}
    if times:
        found["seconds"] = statistics.median(times)
    return found


def _reason(error: BaseException) -> str:
    if isinstance(error, _NotThisSize):
        return str(error)
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        return _DOES_NOT_FIT
    return f"failed: {first_cause(error)}"


def run_apart(network: str, steps: Sequence[str], **options: Any) -> Iterator[dict]:
    """
    :py:func:`apart` in a process of its own.

    Args:
        network: overlay in configs/networks, by name.
        steps: of "inference" and "training".
        **options: further arguments of :py:func:`apart`.

    Yields:
        what it prints, as it comes; an ``"error"`` for each step of which it printed nothing.
    """
    command = [sys.executable, "-m", "scripts.benchmark", "apart", network, f"--steps={list(steps)}"]
    for key, value in options.items():
        command.append(f"--{key}={value}" if isinstance(value, str) else f"--{key}={value!r}")
    seen = set()
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=_ROOT) as process:
            for line in process.stdout or ():
                if line.startswith("{"):
                    found = json.loads(line)
                    seen.add(found["step"])
                    yield found
        errors.seek(0)
        text = errors.read()
    missing = [step for step in steps if step not in seen]
    if not missing:
        return
    raised = re.findall(r"^(?:\w+\.)*(?:\w*Error|\w*Exception): .*$", text, flags=re.MULTILINE)
    reason = f"failed: {raised[-1]}" if raised else f"failed: ended with {process.returncode}"
    if process.returncode in (-9, 137) or _NO_MEMORY.search(text):
        reason = _DOES_NOT_FIT
    for step in missing:
        yield {"step": step, "error": reason}
