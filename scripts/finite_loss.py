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

import math

from ignite.engine import Engine, Events

__all__ = ["FiniteLoss"]

_SKIPPED = 50  # steps after which a scaler's factor, halved at each, is as good as zero


class FiniteLoss:
    """
    Stops a training whose loss is no longer a number, instead of letting it run on for nothing. In fp16 the gradient
    scaler skips steps whose gradients are none: there it stops after fifty such losses in a row.
    """

    def __init__(self) -> None:
        self.in_a_row = 0

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: the trainer.
        """
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """
        Args:
            engine: the trainer.

        Raises:
            ValueError: When the loss of an iteration is NaN or infinite, in fp16 that of fifty in a row.
        """
        loss = float(engine.state.output[0]["loss"])
        self.in_a_row = 0 if math.isfinite(loss) else self.in_a_row + 1
        if self.in_a_row >= (1 if engine.scaler is None else _SKIPPED):
            raise ValueError(
                f"The training loss is {loss} in epoch {engine.state.epoch}, iteration {engine.state.iteration}: lower "
                "learning_rate, set precision to 'fp32', or look for damaged images. The weights last saved are sound."
            )
