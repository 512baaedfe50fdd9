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

"""Fixtures that several test files share."""

from __future__ import annotations

import dataclasses
import functools
import http.server
import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock  # of which torch has need, too
from monai.bundle import ConfigWorkflow, download_large_files

from scripts.phantom import write_phantoms

if not torch.cuda.is_available():  # read when Triton is imported: its kernels then run on the CPU, interpreted
    os.environ["TRITON_INTERPRET"] = "1"

BUNDLE_ROOT = Path(__file__).resolve().parents[1]

TINY = {
    "channels": [8, 16],
    "depths": [1, 1],
    "full_resolution_skip": 8,
    "patch_size": [32, 32, 32],
    "spacing": [5.0, 5.0, 5.0],
    "device": "cpu",
    "num_folds": 3,
    "batch_size": 2,
    "max_epochs": 2,
    "val_interval": 1,
    "sw_overlap": 0.25,
    "check_data": False,
    "pictures": False,
}
"""Overrides for a training on the phantoms within seconds."""


@pytest.fixture(scope="session", autouse=True)
def fast_interpreter():
    """
    Triton's interpreter goes through a scan element by element: here it doubles the stretches scanned. It makes the
    language its own again whenever a function calls another, and a table of NumPy's dtypes at each step: here once for
    each file of functions, and each dtype. And it takes every sum of integers twice to find overflows, of which shapes
    as small as the tests' have none.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    def generic_scan(self, values: list) -> list:
        results = [np.moveaxis(value.handle.data, self.axis, 0).copy() for value in values]
        shift = 1
        while shift < len(results[0]):  # shapes stay powers of two, as Triton wants them
            before = [self.to_tensor(np.roll(r, shift, axis=0), v.dtype) for r, v in zip(results, values)]
            here = [self.to_tensor(r, v.dtype) for r, v in zip(results, values)]
            combined = self.combine_fn.fn(*before, *here)
            combined = combined if isinstance(combined, tuple) else (combined,)
            results = [np.concatenate([r[:shift], c.handle.data[shift:]]) for r, c in zip(results, combined)]
            shift *= 2
        return [self.to_tensor(np.moveaxis(r, 0, self.axis).copy(), v.dtype) for r, v in zip(results, values)]

    dtypes: dict[str, np.dtype] = {}
    find_dtype = interpreter._get_np_dtype

    def numpy_dtype(dtype):
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = find_dtype(dtype)
        return dtypes[name]

    builder = interpreter.interpreter_builder
    options = dataclasses.replace(builder.options, sanitize_overflow=False)
    files = set()

    def call(self, *args, **kwargs):
        if self.fn.__globals__["__name__"] not in files:
            files.add(self.fn.__globals__["__name__"])
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.ScanOps, "generic_scan", generic_scan)
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        patch.setattr(interpreter, "_get_np_dtype", numpy_dtype)
        patch.setattr(builder, "options", options)
        yield


@pytest.fixture(scope="session")
def bundle_root() -> Path:
    """The folder that holds configs and scripts."""
    return BUNDLE_ROOT


@pytest.fixture(scope="session")
def phantom_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of six training and two test phantoms."""
    return Path(write_phantoms(tmp_path_factory.mktemp("data") / "phantom", num_training=6, num_test=2, seed=3))


@pytest.fixture(scope="session")
def run_bundle() -> Callable[..., subprocess.CompletedProcess]:
    """Run ``python -m monai.bundle run`` in a process of its own; configs by names such as "train", or by path."""

    def run(configs: list[str], launcher: tuple[str, ...] = (), **overrides: object) -> subprocess.CompletedProcess:
        files = [
            name if os.path.isabs(name) else f"configs/{name}" + ("" if "." in name else ".json") for name in configs
        ]
        options = [part for key, value in overrides.items() for part in (f"--{key}", str(value).replace("'", '"'))]
        command = [sys.executable, "-m", *launcher, "monai.bundle", "run", "--config_file", str(files), *options]
        environment = {**os.environ, "SEGRESMAMBA_SCAN": os.environ.get("SEGRESMAMBA_SCAN", "auto")}
        return subprocess.run(
            command, cwd=BUNDLE_ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    return run


@pytest.fixture(scope="session")
def workflow() -> Callable[..., ConfigWorkflow]:
    """Make and initialise a workflow in this process; configs by names such as "train", without set-up of logging."""

    def make(configs: list[str], workflow_type: str = "train", **overrides: object) -> ConfigWorkflow:
        files = [str(BUNDLE_ROOT / "configs" / (name + ("" if "." in name else ".json"))) for name in configs]
        made = ConfigWorkflow(
            files,
            meta_file=str(BUNDLE_ROOT / "configs" / "metadata.json"),
            logging_file=False,
            workflow_type=workflow_type,
            bundle_root=str(BUNDLE_ROOT),
            **overrides,
        )
        made.initialize()
        return made

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, phantom_dir: Path, run_bundle: Callable) -> SimpleNamespace:
    """
    The three main jobs, run as a user does: train, evaluate, infer; with what they printed and where they wrote. Once
    for all processes of pytest-xdist.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trained"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done.pkl").is_file():
            made = SimpleNamespace(folder=folder, models=folder / "models", data=phantom_dir)
            made.runs = _main_jobs(made, run_bundle)
            (folder / "done.pkl").write_bytes(pickle.dumps(made))
    return pickle.loads((folder / "done.pkl").read_bytes())


def _main_jobs(places: SimpleNamespace, run_bundle: Callable) -> dict[str, subprocess.CompletedProcess]:
    common = {**TINY, "dataset_dir": places.data, "ckpt_dir": places.models, "pictures": True}
    common["learning_rate"] = (
        1e-4  # with more, so few steps end at background everywhere, and nothing is left to compare
    )
    runs = {}
    for name, configs, own in (
        ("train", ["train"], {"check_data": True}),
        ("evaluate", ["train", "evaluate"], {"check_data": True}),
        ("inference", ["inference"], {}),
    ):
        overrides = {**common, **own, "output_dir": places.folder / name}
        if name == "inference":
            for key in ("num_folds", "batch_size", "max_epochs", "val_interval", "check_data", "learning_rate"):
                overrides.pop(key)
        runs[name] = run_bundle([*configs, "tasks/phantom.yaml"], **overrides)
        assert runs[name].returncode == 0, runs[name].stdout[-3000:] + runs[name].stderr[-3000:]
    return runs


class _Server(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; of those below /cut/ the head promises all and the connection ends after half."""

    def do_GET(self) -> None:
        if not self.path.startswith("/cut/"):
            return super().do_GET()
        content = Path(self.directory, self.path.removeprefix("/cut/")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])

    def log_message(self, *args: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory, trained: SimpleNamespace) -> Iterator[SimpleNamespace]:
    """
    A release of the tiny training: made as a user does, with its weights elsewhere, laid on a server of this machine
    and fetched from there.
    """
    folder = tmp_path_factory.mktemp("released")
    served = folder / "served"
    served.mkdir()
    shutil.copy(trained.models / "model.pt", served)
    handler = functools.partial(_Server, directory=str(served))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    arguments = {
        "task": "configs/tasks/phantom.yaml",
        "version": "9.8.7",
        "changelog": "a test",
        "checkpoint": str(trained.models / "model.pt"),
        "evaluation": str(trained.folder / "evaluate" / "summary.json"),
        "overrides": {key: TINY[key] for key in ("channels", "depths", "full_resolution_skip", "patch_size", "spacing")}
        | {"sw_overlap": TINY["sw_overlap"]},
        "url": f"{url}/segresmamba_v9.8.7.zip",
        "weights_url": f"{url}/model.pt",
        "output_dir": str(served),
    }

    def python(*command: str, cwd: Path = BUNDLE_ROOT) -> str:
        result = subprocess.run(
            [sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout + result.stderr

    said = python("-m", "scripts.release", *(f"--{key}={value}" for key, value in arguments.items()))
    place = ["--name", "segresmamba", "--url", arguments["url"], "--bundle_dir", str(folder / "fetched")]
    python("-m", "monai.bundle", "download", *place, cwd=folder)
    root = folder / "fetched" / "segresmamba"
    download_large_files(str(root))
    yield SimpleNamespace(root=root, served=served, url=url, arguments=arguments, said=said, python=python)
    server.shutdown()
    server.server_close()
