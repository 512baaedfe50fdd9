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
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

__all__ = ["file_name", "interleaved", "processor", "versions", "write_results"]


def processor() -> str:
    """The model's name of this machine's processor."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    return name


def versions() -> dict[str, str | int]:
    """Cores, threads, system and versions that a timing on the CPU depends on."""
    found: dict[str, str | int] = {
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    try:
        import numba

        found["numba"] = numba.__version__
    except ImportError:
        pass
    return found


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

    Returns:
        for each name the median, least and most seconds, and the number of runs.
    """
    seconds: dict[str, list[float]] = {key: [] for key in functions}
    for turn in tqdm(range(-1, rounds), desc=title):
        for key, function in functions.items():
            if key in few and turn not in (0, 1):
                continue
            taken = clock(function)
            if turn >= 0:
                seconds[key].append(taken)
    return {
        key: {"median": statistics.median(s), "min": min(s), "max": max(s), "runs": len(s)}
        for key, s in seconds.items()
    }


def file_name(machine: str) -> str:
    """A machine's name in lower-case letters, digits and underscores."""
    return "".join(c if c.isalnum() else "_" for c in machine).strip("_").lower()


def write_results(results: dict, table: str, name: str, output_dir: str) -> None:
    """
    Write ``<name>.json`` and ``<name>.md``, each whole or not at all, and print the table.

    Args:
        results: what was measured.
        table: the same in Markdown.
        name: of the files.
        output_dir: of the files; made where it is missing.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in (("json", json.dumps(results, indent=4) + "\n"), ("md", table)):
        path = folder / f"{name}.{suffix}"
        path.with_suffix(".tmp").write_text(text)
        path.with_suffix(".tmp").replace(path)
        print(f"written: {path}")
    print(table)
