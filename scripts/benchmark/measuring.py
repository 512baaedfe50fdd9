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
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm

from scripts.output import write_text

from .networks import first_cause

__all__ = [
    "describe",
    "file_name",
    "free_gb",
    "interleaved",
    "machine",
    "peak_mib",
    "pick_device",
    "release_memory",
    "synchronize",
    "wall_clock",
    "write_results",
]


def machine(device: str | torch.device = "cpu") -> dict[str, str | int]:
    """
    What a timing depends on: name of the GPU or the processor, cores, threads, driver, system and versions.

    Args:
        device: that is timed.
    """
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            processor = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), processor)
    found: dict[str, str | int] = {"name": processor}
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found = {"name": properties.name, "multiprocessors": properties.multi_processor_count}
        found |= _of_driver(str(properties.uuid)) | {"l2": properties.L2_cache_size, "processor": processor}
    found |= {
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    for package in ("torch", "monai", "numba", "triton", "mamba-ssm", "causal-conv1d"):
        if (version := _version(package)) is not None:
            found[package] = version
    return found


def _of_driver(uuid: str) -> dict[str, str | int]:
    """The driver's version and a GPU's largest clock, as far as nvidia-smi is there and says so."""
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        query.append(f"--id=GPU-{uuid.removeprefix('GPU-')}")
        answer = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split("\n")[0]
        driver, clock = (part.strip() for part in answer.split(","))
    except (OSError, subprocess.CalledProcessError, ValueError):
        return {}
    return {"driver": driver} | ({"largest clock, MHz": int(clock)} if clock.isdigit() else {})


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe(found: Mapping[str, str | int]) -> str:
    """
    A machine in one line.

    Args:
        found: what :py:func:`machine` says.
    """
    name, *others = found.items()
    return ", ".join([str(name[1]), *(f"{key} {value}" for key, value in others)])


def pick_device(device: str = "") -> str:
    """
    Args:
        device: "cpu", "cuda" or "cuda:1"; default: "cuda" where there is one.

    Raises:
        ValueError: when it is another one, or CUDA is asked for and not there.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device must be cpu or cuda, got {device!r}.")
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError("no CUDA device is here: give --device cpu.")
    return device


def free_gb() -> float:
    """90 % of the host memory that is free, in GB; 0, thus no limit, where the system does not say."""
    if not os.path.exists("/proc/meminfo"):
        return 0.0
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) * 1024
    group = Path("/sys/fs/cgroup")  # a container's limit
    if (group / "memory.max").is_file() and (limit := (group / "memory.max").read_text().strip()) != "max":
        free = min(free, int(limit) - int((group / "memory.current").read_text()))
    return 0.9 * free / 1e9


def release_memory(device: str | torch.device) -> None:
    """Give back what is no longer used, and begin CUDA's peak anew."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def peak_mib(device: str | torch.device) -> int:
    """MiB: of CUDA's allocator, or the largest resident size of this process so far."""
    if torch.device(device).type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    if os.path.exists("/proc/self/status"):  # ru_maxrss would begin at the parent's size
        with open("/proc/self/status") as file:
            return round(next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024)
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)  # bytes on macOS


def synchronize(device: str | torch.device) -> None:
    """Wait for what was given to a device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def wall_clock(function: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(
    title: str,
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    few: Sequence[str] = (),
    clock: Callable[[Callable[[], object]], float] = wall_clock,
    errors: dict[str, str] | None = None,
) -> dict[str, dict[str, float]]:
    """
    Time functions in turn, round by round, after one round that is not counted, so that what else the machine does
    falls on all alike.

    Args:
        title: of the progress bar.
        functions: what is timed, by name.
        rounds: timed calls of each.
        few: names of those called twice only, unwarmed.
        clock: calls a function and returns the seconds it took.
        errors: where given, a function that fails is left out from then on and its error put here.

    Returns:
        for each name that did not fail the median, least and most seconds, and the number of runs.
    """
    seconds: dict[str, list[float]] = {key: [] for key in functions}
    calls = [(turn, key) for turn in range(-1, rounds) for key in functions if key not in few or turn in (0, 1)]
    with tqdm(calls, desc=title) as bar:
        for turn, key in bar:
            if errors is not None and key in errors:
                continue
            bar.set_postfix_str(key)
            try:
                taken = clock(functions[key])
            except Exception as error:  # Triton's own are no RuntimeErrors
                if errors is None:
                    raise
                errors[key] = first_cause(error)
                continue
            if turn >= 0:
                seconds[key].append(taken)
    return {
        key: {"median": statistics.median(s), "min": min(s), "max": max(s), "runs": len(s)}
        for key, s in seconds.items()
        if key not in (errors or ())
    }


def file_name(machine: str) -> str:
    """A machine's name in lower-case letters, digits and underscores."""
    return "".join(c if c.isalnum() else "_" for c in machine).strip("_").lower()


def write_results(
    results: dict, table: str, name: str, output_dir: str, table_csv: str = "", quiet: bool = False
) -> None:
    """
    Write ``<name>.json``, ``<name>.md`` and perhaps ``<name>.csv``, each whole or not at all, and print the table.

    Args:
        results: what was measured.
        table: the same in Markdown.
        name: of the files.
        output_dir: of the files; made where it is missing.
        table_csv: the same as comma-separated values.
        quiet: print nothing.
    """
    texts = {"json": json.dumps(results, indent=4) + "\n", "md": table, "csv": table_csv}
    for suffix, text in texts.items():
        if not text:
            continue
        path = Path(output_dir) / f"{name}.{suffix}"
        write_text(path, text)
        if not quiet:
            print(f"written: {path}")
    if not quiet:
        print(table)
