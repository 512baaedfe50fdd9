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

from types import SimpleNamespace

import pytest

from scripts.finite_loss import FiniteLoss


def trainer(loss: float, scaler: object = None) -> SimpleNamespace:
    return SimpleNamespace(scaler=scaler, state=SimpleNamespace(output=[{"loss": loss}], epoch=2, iteration=7))


def test_a_loss_that_is_no_number_stops_a_training():
    handler = FiniteLoss()
    handler(trainer(0.3))
    for loss in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"loss is {loss} in epoch 2, iteration 7"):
            handler(trainer(loss))


def test_a_gradient_scaler_may_skip_steps_but_not_all():
    handler, nan = FiniteLoss(), trainer(float("nan"), scaler=object())
    for _ in range(2):
        for _ in range(49):
            handler(nan)
        handler(trainer(0.3, scaler=object()))
    for _ in range(49):
        handler(nan)
    with pytest.raises(ValueError, match="training loss is nan"):
        handler(nan)
