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

"""Files are run by a process that does not see this repository, on volumes whose logits the network computed here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from scripts import export as command
from scripts.ensemble import join_weights
from scripts.export import FORMATS, TOLERANCE, exported_program
from scripts.segresmamba import SegResMamba
from scripts.selective_scan.chunked import scan
from scripts.selective_scan.traceable import traceable_scan
from tests.conftest import BUNDLE_ROOT

NETWORK = {"channels": [8, 16], "depths": [0, 0], "full_resolution_skip": 8}
PATCH = (16, 24, 20)
SHAPES = [(1, 1, *PATCH), (2, 1, 11, 17, 14), (3, 1, 19, 12, 23)]  # even, and odd at every level
TRACED_SHAPES = [(1, 1, *PATCH), (3, 1, *PATCH), (2, 1, 20, 16, 28)]  # a trace takes multiples of 4 alone

RUN = """
import sys
import torch

kind, path, volumes, logits = sys.argv[1:]
volumes = torch.load(volumes)
if kind == "onnx":
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    run = lambda volume: torch.from_numpy(session.run(["pred"], {"image": volume.numpy()})[0])
elif kind == "pt2":
    run = torch.export.load(path).module()
else:
    run = torch.jit.load(path)
with torch.no_grad():
    torch.save([run(volume) for volume in volumes], logits)
assert not any(name.split(".")[0] in ("scripts", "monai", "numba") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def network() -> SegResMamba:
    torch.manual_seed(0)
    return SegResMamba(in_channels=1, out_channels=3, stage_conv=False, **NETWORK).eval()


@pytest.fixture(scope="module")
def checkpoint(network: SegResMamba, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def trace_once() -> Callable[..., torch.export.ExportedProgram]:
    """Traces the network of these tests for the first format, and has it at hand for the others: it takes long."""
    made: list[torch.export.ExportedProgram] = []

    def trace(*arguments: object) -> torch.export.ExportedProgram:
        if not made:
            made.append(exported_program(*arguments))
        return made[0]

    return trace


def check_elsewhere(kind: str, file: Path, network: SegResMamba, shapes: Sequence[tuple[int, ...]]) -> None:
    """A process in another folder gets the network's logits from a file."""
    volumes = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    folder = file.parent / "elsewhere"
    folder.mkdir()
    torch.save(volumes, folder / "volumes.pt")
    result = subprocess.run(
        [sys.executable, "-c", RUN, kind, str(file), "volumes.pt", "logits.pt"],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    with torch.no_grad():
        for volume, logits in zip(volumes, torch.load(folder / "logits.pt")):
            expected = network(volume)
            assert expected.std() > 0.01  # the tolerance says something
            torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_runs_without_the_repository(tmp_path, network, checkpoint, kind, trace_once, monkeypatch, capfd):
    if kind == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    file = tmp_path / f"model{FORMATS[kind]}"
    monkeypatch.chdir(BUNDLE_ROOT)
    monkeypatch.setattr(command, "exported_program", trace_once)
    if kind == "pt2":  # read once, by the other process: it takes half a minute
        monkeypatch.setattr(command, "load", lambda path, format: network)
    command.export_bundle(str(file), kind, checkpoint=str(checkpoint), patch_size=list(PATCH), **NETWORK)
    said = capfd.readouterr().out
    assert said.count("largest difference of a logit") == 3 and " MB, patch (16, 24, 20) in " in said
    assert os.listdir(tmp_path) == [file.name]  # nothing half-written
    check_elsewhere(kind, file, network, SHAPES)


def test_an_ensemble(tmp_path, monkeypatch):
    """Its file gives the mean of the networks' logits."""
    small = {"channels": [8, 8], "depths": [0, 0], "full_resolution_skip": 8}
    networks = [SegResMamba(in_channels=1, out_channels=3, stage_conv=False, **small).eval() for _ in range(2)]
    for k, network in enumerate(networks):
        torch.save(network.state_dict(), tmp_path / f"{k}.pt")
    join_weights([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "both.pt")
    monkeypatch.chdir(BUNDLE_ROOT)
    command.export_bundle(
        str(tmp_path / "both.pt2"),
        config_file=["configs/inference.json", "configs/options/ensemble.yaml"],
        checkpoint=str(tmp_path / "both.pt"),
        dynamic=False,
        **{**small, "num_networks": 2, "patch_size": [12, 10, 8]},
    )
    volume = torch.randn(1, 1, 12, 10, 8)
    with torch.no_grad():
        made = torch.export.load(tmp_path / "both.pt2").module()(volume)
        first, second = (network(volume) for network in networks)
    assert (first - second).abs().max() > 0.01
    torch.testing.assert_close(made, (first + second) / 2, rtol=0, atol=TOLERANCE)


def test_torchscript_by_ckpt_export(tmp_path, network, checkpoint):
    options = {"filepath": tmp_path / "model.ts", "ckpt_file": checkpoint, "net_id": "network_def", **NETWORK}
    options |= {"config_file": "configs/inference.json", "meta_file": "configs/metadata.json", "bundle_root": "."}
    options |= {"use_trace": True, "input_shape": [1, 1, *PATCH]}
    command = [sys.executable, "-m", "monai.bundle", "ckpt_export", *(f"--{key}={options[key]}" for key in options)]
    result = subprocess.run(command, cwd=BUNDLE_ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    check_elsewhere("ts", tmp_path / "model.ts", network, TRACED_SHAPES)


@pytest.mark.parametrize("length", [1, 63, 64, 200])
def test_the_loops_of_torchscript_and_of_the_operators_give_the_same(length):
    generator = torch.Generator().manual_seed(length)
    u, delta = (torch.rand(2, length, 6, generator=generator) for _ in range(2))
    A = -torch.rand(6, 4, generator=generator)
    B, C = (torch.randn(2, length, 3, 4, generator=generator) for _ in range(2))
    index = torch.randperm(length, generator=generator)
    for actual, expected in zip(traceable_scan(u, delta, A, B, C, index), scan(u, delta, A, B, C, index=index)):
        torch.testing.assert_close(actual, expected)


def test_norms_of_large_volumes_keep_their_digits(tmp_path):
    """Over groups of 10^5 voxels and more, and with parameters of every channel."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    generator = torch.Generator().manual_seed(0)
    network = torch.nn.GroupNorm(8, 16)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    volume = torch.randn(1, 16, 40, 56, 40, generator=generator).mul(3).exp()
    command.save(exported_program(network, (40, 56, 40), 16, dynamic=False), tmp_path / "norm.onnx", "onnx")
    normed = command.load(tmp_path / "norm.onnx", "onnx")(volume)
    expected = network.double()(volume.double()).detach()
    torch.testing.assert_close(normed.double(), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_what_differs_is_not_written(tmp_path, network, checkpoint, monkeypatch):
    """A file that gives other logits is refused, and what lay in its place stays."""
    file = tmp_path / "model.pt2"
    file.write_text("of before")
    monkeypatch.setattr(command, "exported_program", lambda *_: None)
    monkeypatch.setattr(command, "save", lambda program, path, format: Path(path).write_text("wrong"))
    monkeypatch.setattr(command, "load", lambda path, format: lambda volume: network(volume) + 2 * TOLERANCE)
    monkeypatch.chdir(BUNDLE_ROOT)
    with pytest.raises(ValueError, match="is not written: a logit differs by 0.0002"):
        command.export_bundle(str(file), checkpoint=str(checkpoint), patch_size=list(PATCH), **NETWORK)
    assert file.read_text() == "of before" and os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"format": "tflite"}, ValueError, "unknown format 'tflite': expected one of pt2, onnx"),
        ({"output": "model.onnx"}, ValueError, "a file of format pt2 ends in .pt2"),
        ({"stem_strides": 1}, ValueError, "did you mean --stem_stride?"),
        ({"channels": [8, 24]}, ValueError, "holds the weights of another network"),
        ({"checkpoint": "nowhere.pt"}, FileNotFoundError, "There are no weights at nowhere.pt"),
    ],
)
def test_bad_input_is_refused(tmp_path, checkpoint, monkeypatch, options, error, message):
    monkeypatch.chdir(BUNDLE_ROOT)
    arguments = {"output": str(tmp_path / "model.pt2"), "checkpoint": str(checkpoint), **NETWORK, **options}
    with pytest.raises(error, match=re.escape(message)):
        command.export_bundle(**arguments)
    assert not os.listdir(tmp_path)
