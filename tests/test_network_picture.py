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

import numpy as np
import pytest
from PIL import Image

from scripts.network_picture import network_picture
from tests.conftest import BUNDLE_ROOT


@pytest.fixture(autouse=True)
def in_the_bundle(monkeypatch):
    monkeypatch.chdir(BUNDLE_ROOT)


@pytest.mark.parametrize(("overlay", "rows"), [(None, 4), ("configs/tasks/phantom.yaml", 5)])
def test_a_row_for_each_level(overlay, rows, tmp_path):
    """Each level has a box in the first column, drawn where it belongs: counted along a line through them."""
    network_picture(str(tmp_path / "network.png"), ["configs/inference.json", *([overlay] if overlay else [])])
    pixels = np.asarray(Image.open(tmp_path / "network.png").convert("RGB")).astype(int)
    column = pixels[:, pixels.shape[1] // 30]  # left of the texts and arrows, inside the boxes
    inside = (column < 255).any(-1)
    boxes = [run for run in "".join(".#"[ink] for ink in inside.astype(int)).split(".") if len(run) > 40]  # no title
    assert len(boxes) == rows


def test_a_cube(tmp_path):
    network_picture(str(tmp_path / "network.png"), patch_size=32)
    network_picture(str(tmp_path / "same.png"), patch_size=[32, 32, 32])
    assert (tmp_path / "network.png").read_bytes() == (tmp_path / "same.png").read_bytes()


def test_other_networks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="only SegResMamba is drawn"):
        network_picture(str(tmp_path / "network.png"), ["configs/inference.json", "configs/networks/unet.yaml"])
    assert not list(tmp_path.iterdir())
