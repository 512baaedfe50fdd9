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

import statistics
from collections.abc import Callable
from typing import Any

from scripts.emissions import emissions_tracker

from .measuring import wall_clock

__all__ = ["Energy", "co2_as_in_the_paper"]


def co2_as_in_the_paper(seconds: float, watts: float = 250.0, kg_per_kwh: float = 0.61) -> float:
    """
    CO2-equivalent as SegResMamba's Table 6 has it: time x power x carbon intensity, whatever the machine really drew.

    Args:
        seconds: of computing.
        watts: the machine's power; the paper's is the thermal design power of an A100 PCIe 40 GB.
        kg_per_kwh: carbon intensity; the paper's is that of Amazon's region eu-central-1.

    Returns:
        kg.
    """
    return seconds / 3600 * watts / 1000 * kg_per_kwh


class Energy:
    """
    Energy and CO2-equivalent of calls, by ``codecarbon`` without network: measured where the processor or the GPU has
    a meter that it may read, else estimated from the processor's design power, its load and the size of the memory.

    Args:
        country: ISO code of three letters, whose carbon intensity is taken.
        device: "cpu", or the GPU whose energy counts too.

    Raises:
        ModuleNotFoundError: when ``codecarbon`` is not installed.
        ValueError: when ``country`` is no such code.
    """

    def __init__(self, country: str, device: str = "cpu") -> None:
        self.tracker = emissions_tracker(country, device, save_to_file=False)
        self.tracker.start_task()
        if not self.tracker.stop_task().country_name:
            raise ValueError(f"codecarbon does not know the country {country!r}: give an ISO code such as DEU.")
        self.calls: dict[Callable[[], object], list[Any]] = {}

    def clock(self, function: Callable[[], object]) -> float:
        """
        Call a function, note what it drew and return the seconds it took.

        Args:
            function: what is called.
        """
        self.tracker.start_task()
        try:
            return wall_clock(function)
        finally:
            self.calls.setdefault(function, []).append(self.tracker.stop_task())

    def of(self, function: Callable[[], object]) -> dict[str, float]:
        """
        Args:
            function: one that :py:meth:`clock` has called.

        Returns:
            median energy (Wh) and CO2-equivalent (g) of its calls but the first, and the powers (W) they come from.
        """
        calls = self.calls[function][1:] or self.calls[function]

        def median(name: str) -> float:
            return statistics.median(getattr(call, name) for call in calls)

        return {
            "energy_wh": 1000 * median("energy_consumed"),
            "co2_g": 1000 * median("emissions"),
            "cpu_w": median("cpu_power"),
            "gpu_w": median("gpu_power"),
            "ram_w": median("ram_power"),
        }

    def forget(self) -> None:
        """Let go of the functions that were called, and of what they hold."""
        self.calls.clear()
