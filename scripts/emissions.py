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
"""Energy and CO2-equivalent, by codecarbon without network."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

__all__ = ["Emissions", "emissions_tracker"]


def emissions_tracker(country: str, device: str = "cpu", **options: Any) -> Any:
    """
    Args:
        country: ISO code of three letters, whose carbon intensity is taken.
        device: "cpu", or the GPU whose energy counts too.
        options: of codecarbon's ``OfflineEmissionsTracker``.

    Returns:
        such a tracker, that says nothing by itself and lets others run beside it.

    Raises:
        ModuleNotFoundError: when ``codecarbon`` is not installed.
        ValueError: when ``country`` is no such code.
    """
    if not re.fullmatch("[A-Z]{3}", country):
        raise ValueError(f"country must be an ISO code of three letters, such as DEU, got {country!r}.")
    try:
        from codecarbon import OfflineEmissionsTracker
    except ImportError as error:
        raise ModuleNotFoundError(f"measuring energy needs codecarbon: pip install codecarbon: {error}") from error
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)  # it speaks before it has read log_level
    gpus = [torch.device(device).index or 0] if device.startswith("cuda") else []
    common: dict[str, Any] = dict(
        country_iso_code=country, log_level="critical", allow_multiple_runs=True, gpu_ids=gpus
    )
    return OfflineEmissionsTracker(**common, **options)


class Emissions:
    """
    Handler that measures the energy of a run and its CO2-equivalent and adds a line to ``emissions.csv``, also where
    the run is broken off: by the meters of processor and GPU where they may be read, else estimated from the
    processor's design power, its load and the size of the memory (the file's columns say which powers were taken).

    Args:
        output_dir: folder to write to.
        country: ISO code of three letters, whose carbon intensity is taken.
        device: that the run computes on.

    Raises:
        ModuleNotFoundError: when ``codecarbon`` is not installed.
        ValueError: when ``country`` is no such code.
    """

    def __init__(self, output_dir: str, country: str, device: Any = "cpu") -> None:
        self.output_dir = Path(output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.tracker = emissions_tracker(
            country, str(device), output_dir=str(output_dir), project_name=self.output_dir.name
        )

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: trainer or evaluator.
        """
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.COMPLETED, self.stopped)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.broken_off)

    def started(self, engine: Engine) -> None:
        """
        Args:
            engine: the one that starts.
        """
        self.tracker.start()

    def stopped(self, engine: Engine) -> None:
        """
        Args:
            engine: the one that is done.
        """
        self.tracker.stop()

    def broken_off(self, engine: Engine, error: BaseException) -> None:
        """
        Args:
            engine: the one that was stopped by an error.
            error: which is raised again.
        """
        self.tracker.stop()
        raise error
