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

import matplotlib
from matplotlib.image import imread

from scripts.training_curve import TrainingCurve


def test_training_curve(tmp_path):
    validator = SimpleNamespace(state=SimpleNamespace(epoch=0, metrics={}))
    trainer = SimpleNamespace(state=SimpleNamespace(epoch=0, metrics={}))
    backend = matplotlib.get_backend()

    def run(curve, epochs):
        curve.started(trainer)
        for epoch in epochs:
            trainer.state.epoch, trainer.state.metrics = epoch, {"train_mean_loss": 1 / epoch}
            if epoch % 2 == 0:
                validator.state.epoch, validator.state.metrics = epoch, {"val_mean_dice": 1 - 1 / epoch}
            curve.epoch_completed(trainer)

    run(TrainingCurve(str(tmp_path), validator), range(1, 7))
    trainer.state.epoch = 4  # interrupted in epoch 7, resumed from epoch 4
    curve = TrainingCurve(str(tmp_path), validator)
    run(curve, range(5, 9))
    assert [row[0] for row in curve.rows] == list(range(1, 9))
    assert [row[2] for row in curve.rows][:4] == [None, 0.5, None, 0.75]
    assert imread(tmp_path / "training_curve.png").shape[0] > 400
    assert sorted(file.name for file in tmp_path.iterdir()) == ["training_curve.csv", "training_curve.png"]
    assert matplotlib.get_backend() == backend
