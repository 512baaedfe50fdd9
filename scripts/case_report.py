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
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from ignite.engine import Engine, Events

from scripts.output import write_text

__all__ = ["CaseReport"]


class CaseReport:
    """
    Handler of an inference that writes, case by case, the volume of each class and how long the case took from reading
    its file to writing its label map: to ``cases.json``, and a line of each to the log. The first case of a run has to
    wait for what is compiled or loaded once. Cases of earlier runs stay in the file.

    It takes the label maps (1, D, H, W) as the engine's postprocessing leaves them, on the image's original grid.

    Args:
        output_dir: folder to write to.
        class_names: names by label value, background first; values without a name are left out.
        pred_key: key of the label map in the engine's output.
    """

    def __init__(self, output_dir: str, class_names: Sequence[str], pred_key: str = "pred") -> None:
        self.path = Path(output_dir) / "cases.json"
        self.names = {value: name for value, name in enumerate(class_names) if value and name}
        self.pred_key = pred_key
        self.logger = logging.getLogger(__name__)
        self._cases: dict[str, dict] = {}
        self._begun = 0.0

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: the evaluator.
        """
        self.logger = engine.logger
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self.batch_started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def started(self, engine: Engine) -> None:
        """
        Args:
            engine: the evaluator.
        """
        self._cases = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}

    def batch_started(self, engine: Engine) -> None:
        """
        Args:
            engine: the evaluator.
        """
        self._begun = time.perf_counter()

    def __call__(self, engine: Engine) -> None:
        """
        Args:
            engine: the evaluator.
        """
        seconds = (time.perf_counter() - self._begun) / len(engine.state.output)
        for output in engine.state.output:
            labels = output[self.pred_key]
            name = os.path.basename(str(labels.meta["filename_or_obj"]))
            voxel = abs(float(np.linalg.det(np.asarray(labels.affine, dtype=np.float64)[:3, :3]))) / 1000
            counts = torch.bincount(labels.as_tensor().flatten().long(), minlength=max(self.names, default=0) + 1)
            volumes = {label: round(int(counts[value]) * voxel, 3) for value, label in self.names.items()}
            self._cases[name] = {"seconds": round(seconds, 2), "volumes_ml": volumes}
            self.logger.info(f"{name}: {seconds:.1f} s; " + ", ".join(f"{k} {v:.2f} ml" for k, v in volumes.items()))
        write_text(self.path, json.dumps(self._cases, indent=1, ensure_ascii=False) + "\n")
