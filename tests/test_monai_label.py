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
"""The bundle in a real MONAI Label server, with this file as the client that 3D Slicer or OHIF would be."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from tests.conftest import BUNDLE_ROOT
from tests.test_datalist import HIPPOCAMPUS

LABEL_VENV = Path(os.environ.get("SEGRESMAMBA_LABEL_VENV", BUNDLE_ROOT / ".venv-label")).absolute()
WEIGHTS = BUNDLE_ROOT / "models" / "model.pt"
CASES = ("hippocampus_001", "hippocampus_003", "hippocampus_004", "hippocampus_006", "hippocampus_008")

pytestmark = [
    pytest.mark.skipif(not (LABEL_VENV / "bin" / "monailabel").is_file(), reason="no MONAI Label: make label-test"),
    pytest.mark.skipif(  # but not where these tests were asked for
        "SEGRESMAMBA_LABEL_VENV" not in os.environ and not HIPPOCAMPUS.is_dir(),
        reason=f"no {HIPPOCAMPUS}: set SEGRESMAMBA_DATA",
    ),
]


class Server:
    """A server on the loopback address, spoken to in its REST interface."""

    def __init__(self, folder: Path) -> None:
        self.studies, self.bundle = folder / "studies", folder / "monaibundle" / "model" / "segresmamba"
        self.log = folder / "server.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def call(self, path: str, method: str = "GET", fields: dict[str, Any] | None = None, **files: Path) -> bytes:
        """Send form fields and files, or with ``fields`` alone a JSON body where the path is no inference."""
        headers, body = {}, None
        if fields is not None and not files and not path.startswith("/infer"):
            headers, body = {"Content-Type": "application/json"}, json.dumps(fields).encode()
        elif fields is not None:
            mark = uuid.uuid4().hex
            parts = [
                f'--{mark}\r\nContent-Disposition: form-data; name="params"\r\n\r\n{json.dumps(fields)}\r\n'.encode()
            ]
            for name, file in files.items():
                head = f'Content-Disposition: form-data; name="{name}"; filename="{file.name}"'
                parts.append(f"--{mark}\r\n{head}\r\n\r\n".encode() + file.read_bytes() + b"\r\n")
            headers = {"Content-Type": f"multipart/form-data; boundary={mark}"}
            body = b"".join(parts) + f"--{mark}--\r\n".encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, headers, method=method)
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.read()

    def json(self, path: str, method: str = "GET", fields: dict[str, Any] | None = None, **files: Path) -> Any:
        return json.loads(self.call(path, method, fields, **files))

    def segment(self, image: str, **options: Any) -> nib.Nifti1Image:
        content = self.call(f"/infer/segresmamba?image={image}&output=image", "POST", {"device": "cpu", **options})
        return read_image(content, self.studies.parent)

    def expect(self, line: str, seconds: float = 30) -> None:
        """Wait for a line in the log, which is written a little later than the answer is sent."""
        end = time.monotonic() + seconds
        while line not in (text := self.log.read_text()):
            assert time.monotonic() < end, text[-3000:]
            time.sleep(0.2)

    def wait(self, process: subprocess.Popen, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while True:
            try:
                self.call("/info/")
                return
            except (urllib.error.URLError, ConnectionError):
                if process.poll() is not None or time.monotonic() > end:
                    pytest.fail("the server did not start:\n" + self.log.read_text()[-3000:])
                time.sleep(0.5)


def read_image(content: bytes, folder: Path) -> nib.Nifti1Image:
    path = folder / f"{uuid.uuid4().hex}.nii.gz"
    path.write_bytes(content)
    return nib.load(path)


def values(image: nib.Nifti1Image) -> np.ndarray:
    return np.asarray(image.dataobj)


def dice(one: np.ndarray, other: np.ndarray) -> list[float]:
    return [2 * np.sum((one == k) & (other == k)) / (np.sum(one == k) + np.sum(other == k)) for k in (1, 2)]


def turned(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0, 7], [s, c, 0, -11], [0, 0, 1, 3], [0, 0, 0, 1]])


def write_orientations(folder: Path) -> None:
    """The same volume in other orientations: voxels in another order, in space at the same place; and two at others."""
    image = nib.as_closest_canonical(nib.load(HIPPOCAMPUS / "imagesTr" / f"{CASES[0]}.nii.gz"))
    for name in ("LAS", "LPS", "PIR"):
        order = nib.orientations.axcodes2ornt(tuple(name))
        nib.save(image.as_reoriented(order), folder / f"{name}.nii.gz")
    nib.save(nib.Nifti1Image(values(image), turned(0.35) @ image.affine), folder / "oblique.nii.gz")
    thick = nib.Nifti1Image(values(image)[:, :, ::2], image.affine @ np.diag([1, 1, 2, 1]))
    nib.save(thick, folder / "thick.nii.gz")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    assert HIPPOCAMPUS.is_dir(), f"no {HIPPOCAMPUS}: set SEGRESMAMBA_DATA to the folder that holds Task04_Hippocampus"
    folder = tmp_path_factory.mktemp("label")
    path = {"PATH": f"{LABEL_VENV / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    command = ["monailabel", "apps", "--download", "--name", "monaibundle", "--output", str(folder)]
    subprocess.run(command, env={**os.environ, **path}, check=True, capture_output=True)
    made = Server(folder)
    made.studies.mkdir()
    for case in CASES:
        shutil.copy(HIPPOCAMPUS / "imagesTr" / f"{case}.nii.gz", made.studies)
    write_orientations(made.studies)
    made.bundle.mkdir(parents=True)
    for part in ("configs", "scripts", "docs"):
        shutil.copytree(BUNDLE_ROOT / part, made.bundle / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(BUNDLE_ROOT / "large_files.yml", made.bundle)
    (made.bundle / "models").mkdir()
    shutil.copy(WEIGHTS, made.bundle / "models")  # a copy: training writes there
    options = ["--conf", "models", "segresmamba", "--conf", "zoo_source", "local", "--conf", "sam2", "false"]
    options += ["--conf", "epistemic_model", "segresmamba"]
    command = ["monailabel", "start_server", "--app", str(folder / "monaibundle"), "--studies", str(made.studies)]
    with open(made.log, "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*command, *options, "--host", "127.0.0.1", "--port", str(made.port)],
            env={**os.environ, **path, "MONAI_LABEL_AUTO_UPDATE_SCORING": "false"},
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            made.wait(process)
            yield made
        finally:
            process.terminate()
            process.wait(30)


def test_what_the_server_offers(server):
    info = server.json("/info/")
    model = info["models"]["segresmamba"]
    assert model["labels"] == {"anterior": 1, "posterior": 2} and model["dimension"] == 3
    metadata = json.loads((BUNDLE_ROOT / "configs" / "metadata.json").read_text())
    assert model["version"] == metadata["version"]
    assert {"sw_overlap", "sw_batch_size", "test_time_flipping", "precision"} < set(model["config"])
    assert "segresmamba" in info["trainers"] and "segresmamba" in info["scoring"]


@pytest.mark.parametrize("name", [CASES[0], "LAS", "LPS", "PIR", "oblique", "thick"])
def test_label_maps_lie_on_their_image(name, server):
    image, label = nib.load(server.studies / f"{name}.nii.gz"), server.segment(name)
    assert label.shape == image.shape and label.get_data_dtype() == np.uint8
    np.testing.assert_allclose(label.affine, image.affine, atol=1e-3)
    reference = values(nib.as_closest_canonical(nib.load(HIPPOCAMPUS / "labelsTr" / f"{CASES[0]}.nii.gz")))
    if name == "thick":
        reference = reference[:, :, ::2]
    if name != "oblique":
        label = nib.as_closest_canonical(label)
    assert min(dice(values(label), reference)) > (0.7 if name == "thick" else 0.85)


def test_options_of_the_panel(server):
    plain = values(server.segment(CASES[1]))
    other = values(server.segment(CASES[1], test_time_flipping=True, sw_overlap=0.25, sw_batch_size=2))
    assert (plain != other).any() and min(dice(plain, other)) > 0.9
    answer = server.json(f"/infer/segresmamba?image={CASES[1]}&output=json", "POST", {"device": "cpu"})
    assert answer["label_names"] == {"anterior": 1, "posterior": 2}


def test_a_file_that_the_client_sends(server):
    file = HIPPOCAMPUS / "imagesTr" / "hippocampus_011.nii.gz"
    content = server.call("/infer/segresmamba?output=image", "POST", {"device": "cpu"}, file=file)
    label, reference = read_image(content, server.studies.parent), nib.load(HIPPOCAMPUS / "labelsTr" / file.name)
    np.testing.assert_allclose(label.affine, reference.affine, atol=1e-3)
    assert min(dice(values(label), values(reference))) > 0.8


def test_uncertainty_of_unlabelled_volumes(server):
    """Active learning: runs with dropout differ, and their spread is noted at each volume that has no label yet."""
    request = {"max_workers": 1, "simulation_size": 2, "max_samples": 2, "device": "cpu"}
    server.call("/scoring/segresmamba?run_sync=true", "POST", request)
    images = server.json("/datastore/?output=all")["objects"]
    scored = [image["image"]["info"] for image in images.values() if "epistemic_entropy" in image["image"]["info"]]
    assert len(scored) == 2 and all(np.isfinite(info["epistemic_entropy"]) for info in scored)


def test_annotate_train_and_segment_again(server):
    for case in CASES[:4]:
        label = HIPPOCAMPUS / "labelsTr" / f"{case}.nii.gz"
        server.call(f"/datastore/label?image={case}&tag=final", "PUT", {}, label=label)
    assert (server.studies / "labels" / "final" / f"{CASES[0]}.nii.gz").is_file()
    assert server.json("/info/")["datastore"]["completed"] == 4
    assert server.json("/activelearning/first", "POST", {})["id"] not in CASES[:4]

    weights = server.bundle / "models" / "model.pt"
    before = torch.load(weights, weights_only=True)
    request = {"max_epochs": 1, "val_split": 0.25, "device": "cpu", "pretrained": True, "multi_gpu": False}
    server.call("/train/segresmamba?run_sync=true", "POST", {**request, "tracking": "None"})
    server.expect("Restored all variables from")
    after = torch.load(weights, weights_only=True)
    assert set(after) == set(before)
    changes = [(after[name].float() - before[name].float()).abs().max().item() for name in before]
    assert 0 < max(changes) < 0.1  # two steps further, not from scratch
    reference = nib.load(HIPPOCAMPUS / "labelsTr" / f"{CASES[4]}.nii.gz")
    assert min(dice(values(server.segment(CASES[4])), values(reference))) > 0.8


def test_weights_of_another_network_are_no_silent_nonsense(server):
    weights = server.bundle / "models" / "model.pt"
    kept = weights.read_bytes()
    try:
        other = {name: torch.zeros(*value.shape, 2) for name, value in torch.load(weights, weights_only=True).items()}
        torch.save(other, weights)
        os.utime(weights, (time.time() + 5,) * 2)  # the server looks at the time stamp
        with pytest.raises(urllib.error.HTTPError) as error:
            server.segment(CASES[4])
        assert error.value.code == 500
        server.expect("size mismatch for stem.weight")
    finally:
        weights.write_bytes(kept)
        os.utime(weights, (time.time() + 10,) * 2)
    server.segment(CASES[4])
