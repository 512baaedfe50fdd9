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

from pathlib import Path

from monai.bundle import ConfigParser

__all__ = ["load_papers"]


def load_papers() -> dict[str, dict[str, dict[str, float]]]:
    """The papers' figures by set-up and network, from docs/benchmarks/papers.yaml, which has their units."""
    return ConfigParser.load_config_file(Path(__file__).parents[2] / "docs" / "benchmarks" / "papers.yaml")
