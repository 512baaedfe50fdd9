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

import pytest
import torch
from monai.engines import SupervisedTrainer
from monai.inferers import SimpleInferer

from scripts.gradient_clipping import GradientClipping


def step(max_norm: float, scaler: torch.amp.GradScaler | None = None) -> torch.Tensor:
    """The gradient that plain SGD of rate 1 has used in one step from zero."""
    network = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.zeros_(network.weight)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=[{"image": torch.tensor([[3.0, 0.0, 4.0]]), "label": torch.tensor([[10.0]])}],
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
        loss_function=lambda output, label: (label - output).sum(),  # the gradient is the input, turned: of norm 5
        inferer=SimpleInferer(),
        train_handlers=[GradientClipping(max_norm)],
    )
    if scaler is not None:
        trainer.amp, trainer.scaler = True, scaler
    trainer.run()
    return network.weight.detach()[0]


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("scaled", [False, True])
def test_larger_gradients_are_scaled_down(scaled):
    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None

    assert torch.allclose(step(2.0, scaler()), torch.tensor([1.2, 0.0, 1.6]), atol=1e-5)
    assert torch.allclose(step(6.0, scaler()), torch.tensor([3.0, 0.0, 4.0]))


def test_a_norm_that_is_none_is_refused():
    with pytest.raises(ValueError, match="max_norm must be above 0"):
        GradientClipping(0)
