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

"""Handlers that let an interrupted training go on to the same result as an unbroken one."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from monai.data.utils import set_rnd
from monai.engines import Evaluator
from monai.handlers import CheckpointSaver

from scripts.weights import damaged_part

__all__ = ["BestModelSaver", "EpochSeed", "TrainingCheckpoint"]


class EpochSeed:
    """
    Makes all randomness of an epoch, its shuffle and its augmentation, a function of the seed and the epoch alone, by
    seeding PyTorch and the random transforms when the epoch starts.

    Worker processes of the data loader take their seeds from PyTorch's; they must not be persistent, since they would
    keep the random state of earlier epochs.

    Args:
        seed: a number from 0.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: the trainer.

        Raises:
            ValueError: When the trainer's data loader keeps its worker processes.
        """
        if getattr(engine.data_loader, "persistent_workers", False):
            raise ValueError("EpochSeed cannot reseed persistent workers: set persistent_workers to false.")
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """
        Args:
            engine: the trainer.
        """
        sequence = np.random.SeedSequence([self.seed, engine.state.epoch, engine.state.rank])
        seed = int(sequence.generate_state(1)[0])
        torch.manual_seed(seed)
        set_rnd(engine.data_loader.dataset, seed=seed)


class BestModelSaver(CheckpointSaver):
    """
    MONAI's ``CheckpointSaver`` for the weights of the best validation so far, in one file. The file is replaced in one
    step, so that a good one is there at any moment, and "best" is the evaluator's own record, which a resumed training
    takes over from the interrupted one.

    Args:
        save_dir: folder of the file.
        save_dict: what to save; of a single object the file holds the plain state dict.
        filename: name of the file.
    """

    def __init__(self, save_dir: str, save_dict: dict, filename: str = "model.pt") -> None:
        super().__init__(save_dir=save_dir, save_dict=save_dict, save_key_metric=True, key_metric_filename=filename)
        self._key_metric_checkpoint.save_handler = _ReplacingDiskSaver(save_dir, filename)

    def metrics_completed(self, engine: Engine) -> None:
        """
        Args:
            engine: the evaluator.
        """
        if engine.state.best_metric_epoch == engine.state.epoch:
            super().metrics_completed(engine)


class TrainingCheckpoint:
    """
    Writes the whole state of a training after every so many epochs, and goes on from it.

    The file is replaced in one step and holds the state dicts of what is given, of the trainer (epoch, iteration) and
    of its gradient scaler, and the validation's best metric. It loads with ``weights_only=True``.

    Attach it behind the handlers that validate and that step the learning rate.

    Args:
        save_dir: folder of the file.
        save_dict: objects with ``state_dict`` and ``load_state_dict``: model, optimizer, lr_scheduler.
        plan: settings that must be the same when a training goes on, such as the seed and the fold; plain values.
        validator: the evaluator whose best metric belongs to the state, if any.
        resume: whether to go on from the file.
        interval: number of epochs from file to file. The last epoch is always written.
        filename: name of the file.
        map_location: device to load to.
    """

    def __init__(
        self,
        save_dir: str,
        save_dict: Mapping[str, Any],
        plan: Mapping[str, Any] | None = None,
        validator: Evaluator | None = None,
        resume: bool = False,
        interval: int = 1,
        filename: str = "last.pt",
        map_location: str | torch.device | None = None,
    ) -> None:
        self.path = os.path.join(save_dir, filename)
        self.save_dict = dict(save_dict)
        self.plan = dict(plan or {})
        self.validator = validator
        self.resume = resume
        self.interval = interval
        self.map_location = map_location
        self.logger = logging.getLogger(__name__)
        self._saver = _ReplacingDiskSaver(save_dir, filename)

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: the trainer.
        """
        self.logger = engine.logger
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)

    def started(self, engine: Engine) -> None:
        """
        Go on from the file, where that is asked for.

        Args:
            engine: the trainer.

        Raises:
            FileNotFoundError: When there is no file.
            ValueError: When the file is no checkpoint of a training, or belongs to one with other settings.
        """
        found = os.path.isfile(self.path)
        if not self.resume:
            if found:
                self.logger.warning(f"Starting anew: {self.path}, from an earlier training, will be replaced.")
            return
        if not found:
            raise FileNotFoundError(f"There is no training to resume: {self.path} does not exist.")
        checkpoint = self._read()
        now = {**engine.state_dict(), **self.plan}
        then = {**checkpoint["trainer"], **checkpoint["plan"]}
        # A setting that the file does not have is of a later version of the bundle.
        differing = [key for key in now if key != "iteration" and now[key] != then.get(key, now[key])]
        if differing:
            listed = ", ".join(f"{key} {then.get(key)} then, {now[key]} now" for key in differing)
            raise ValueError(f"{self.path} belongs to a training with other settings ({listed}): resume with the same.")
        Checkpoint.load_objects(to_load={**self.save_dict, "trainer": engine}, checkpoint=checkpoint)
        if engine.scaler is not None:
            engine.scaler.load_state_dict(checkpoint["scaler"])
        if self.validator is not None:
            self.validator.state.best_metric = checkpoint["validation"]["best_metric"]
            self.validator.state.best_metric_epoch = checkpoint["validation"]["best_metric_epoch"]
        self.logger.info(f"Resumed from {self.path}: {engine.state.epoch} of {engine.state.max_epochs} epochs done.")

    def _read(self) -> dict[str, Any]:
        damaged = damaged_part(self.path)
        try:
            checkpoint = torch.load(self.path, map_location=self.map_location, weights_only=True)
        except Exception as error:
            damaged = damaged or str(error).splitlines()[0]
        if damaged is not None:
            raise ValueError(
                f"{self.path} is damaged, or no checkpoint ({damaged}): put a copy of it back, or remove it and train "
                "anew, without --resume."
            )
        needed = {*self.save_dict, "trainer", "scaler", "plan"}
        if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
            raise ValueError(
                f"{self.path} is no checkpoint of such a training, with {', '.join(sorted(needed))}: train anew, "
                "without --resume. Weights alone are given with --pretrained."
            )
        return checkpoint

    def epoch_completed(self, engine: Engine) -> None:
        """
        Write the file, where the epoch is one to write after.

        Args:
            engine: the trainer.
        """
        if engine.state.epoch % self.interval and engine.state.epoch != engine.state.max_epochs:
            return
        checkpoint = {name: _unwrapped(item).state_dict() for name, item in self.save_dict.items()}
        checkpoint["trainer"] = dict(engine.state_dict())
        checkpoint["scaler"] = {} if engine.scaler is None else engine.scaler.state_dict()
        checkpoint["plan"] = self.plan
        if self.validator is not None:
            state = self.validator.state
            checkpoint["validation"] = {
                "best_metric": float(state.best_metric),
                "best_metric_epoch": state.best_metric_epoch,
            }
        self._saver(checkpoint, os.path.basename(self.path))


class _ReplacingDiskSaver(DiskSaver):
    """Writes always the same file, first under another name, then moved over the old one; removes nothing."""

    def __init__(self, dirname: str, filename: str) -> None:
        super().__init__(dirname, atomic=True, require_empty=False)
        self.filename = filename

    def __call__(self, checkpoint: Mapping, filename: str, metadata: Mapping | None = None) -> None:
        super().__call__(checkpoint, self.filename, metadata)

    def remove(self, filename: str) -> None:
        return


def _unwrapped(item: Any) -> Any:
    """The network inside a (distributed) data-parallel one, anything else as it is."""
    parallel = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    return item.module if isinstance(item, parallel) else item
