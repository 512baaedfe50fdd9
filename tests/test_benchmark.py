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
import subprocess
import sys

import pytest
import torch


def run(bundle_root, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "scripts.benchmark", *arguments]
    return subprocess.run(command, cwd=bundle_root, capture_output=True, text=True)


def test_a_trial_of_the_gpu_benchmark_on_the_cpu(bundle_root, tmp_path):
    options = ("--device", "cpu", "--tiny", "True", "--rounds", "1", "--output_dir", str(tmp_path), "--name", "trial")
    result = run(bundle_root, "gpu", *options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-trial.json", "gpu-trial.md"]
    results = json.loads((tmp_path / "gpu-trial.json").read_text())
    assert {row["dtype"] for row in results["scan"]} == {"float16", "bfloat16", "float32"}
    assert all(row["forward and backward"]["chunked"]["median"] > 0 for row in results["scan"])
    assert set(results["networks"][0]["networks"]) == {"SegResMamba (tables)", "SegResMamba (text)"}
    table = (tmp_path / "gpu-trial.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 3 * 2 + 3 + 1 + 2  # three heads of two lines, and what was measured


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_it_says_so(bundle_root, tmp_path):
    result = run(bundle_root, "gpu", "--output_dir", str(tmp_path))
    assert result.returncode != 0 and "no CUDA device" in result.stderr
    assert not list(tmp_path.iterdir())


def test_training_memory(bundle_root):
    result = run(bundle_root, "training_memory", "--spatial_size", "16")
    figures = json.loads(result.stdout)
    assert figures["peak"] > figures["before"] > 0
