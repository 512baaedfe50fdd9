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
"""What a run was made of, beside what it leaves."""

from __future__ import annotations

import functools
import json
import os
import platform
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

from scripts.output import write_text
from scripts.preflight import executed_config

__all__ = ["RunRecord", "run_name"]


@functools.cache
def run_name() -> str:
    """
    Returns:
        date and time, the same for all that this process asks.
    """
    return time.strftime("%Y%m%d_%H%M%S")


class RunRecord:
    """
    Handler that writes, before a run does anything, what it takes to understand and to repeat it: ``config.json``, the
    config with all overlays and the command line's values (of ``python -m monai.bundle run``), and
    ``environment.json``: command line, Python, system, processor, GPU and the versions of all packages.

    Args:
        output_dir: folder to write to.
    """

    def __init__(self, output_dir: str) -> None:
        self.output_dir = Path(output_dir)

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: trainer or evaluator.
        """
        engine.add_event_handler(Events.STARTED, self.started)

    def started(self, engine: Engine) -> None:
        """
        Args:
            engine: the one that starts.
        """
        config = executed_config()
        if config is not None:
            write_text(self.output_dir / "config.json", json.dumps(config, indent=4) + "\n")
        write_text(self.output_dir / "environment.json", json.dumps(_environment(), indent=4) + "\n")


def _environment() -> dict[str, Any]:
    return {
        "command": sys.argv,
        "folder": os.getcwd(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "packages": dict(sorted({found.metadata["Name"]: found.version for found in distributions()}.items())),
    }
