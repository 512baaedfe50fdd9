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


class FiniteLoss:
    """Stops a training whose loss is no longer a number, instead of letting it run on for nothing."""

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
            ValueError: When the loss of an iteration is NaN or infinite.
        """
        if engine.scaler is not None:  # in fp16 the gradient scaler skips such a step
            return
        loss = float(engine.state.output[0]["loss"])
        if not math.isfinite(loss):
            raise ValueError(
                f"The training loss is {loss} in epoch {engine.state.epoch}, iteration {engine.state.iteration}: lower "
                "learning_rate, set precision to 'fp32', or look for damaged images. The last checkpoint is sound."
            )
