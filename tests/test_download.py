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

import hashlib
import http.server
import tarfile
import threading
from functools import partial
from pathlib import Path

import pytest
from monai.apps import DecathlonDataset

from scripts.datalist import load_datalist
from scripts.download import download
from tests.lookalikes import make_tree


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A small archive of a task, on a server of this machine."""
    make_tree("spleen", tmp_path / "made" / "Task09_Spleen")
    archive = tmp_path / "served" / "Task09_Spleen.tar"
    archive.parent.mkdir()
    with tarfile.open(archive, "w") as tar:
        tar.add(tmp_path / "made" / "Task09_Spleen", "Task09_Spleen")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=archive.parent)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/Task09_Spleen.tar"
    monkeypatch.setitem(DecathlonDataset.resource, "Task09_Spleen", url)
    monkeypatch.setitem(DecathlonDataset.md5, "Task09_Spleen", hashlib.md5(archive.read_bytes()).hexdigest())
    yield archive
    server.shutdown()
    server.server_close()


def test_a_task_is_fetched_once(served, tmp_path, capsys):
    download("Task09_Spleen", str(tmp_path / "data"))
    assert len(load_datalist(tmp_path / "data" / "Task09_Spleen", "all")) == 4
    served.unlink()
    download("Task09_Spleen", str(tmp_path / "data"))
    assert "is there already" in capsys.readouterr().out


def test_another_sum_is_refused(served, tmp_path, monkeypatch):
    monkeypatch.setitem(DecathlonDataset.md5, "Task09_Spleen", "0" * 32)
    with pytest.raises(ValueError, match="not what was expected"):
        download("Task09_Spleen", str(tmp_path / "data"))
    assert not (tmp_path / "data" / "Task09_Spleen").exists()


def test_an_interrupted_unpacking_leaves_no_task_behind(served, tmp_path, monkeypatch):
    def interrupted(archive, folder, **options):
        (folder_of_task := Path(folder, "Task09_Spleen")).mkdir()
        (folder_of_task / "dataset.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("scripts.download.extractall", interrupted)
        download("Task09_Spleen", str(tmp_path / "data"))
    assert [file.name for file in (tmp_path / "data").iterdir()] == ["Task09_Spleen.tar"]
    served.unlink()  # what was fetched is not fetched again
    download("Task09_Spleen", str(tmp_path / "data"))
    assert len(load_datalist(tmp_path / "data" / "Task09_Spleen", "all")) == 4


def test_half_a_folder_is_not_taken_for_the_task(served, tmp_path):
    (tmp_path / "data" / "Task09_Spleen" / "imagesTr").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no dataset.json: remove it"):
        download("Task09_Spleen", str(tmp_path / "data"))


def test_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setitem(DecathlonDataset.resource, "Task09_Spleen", "http://nowhere.invalid/Task09_Spleen.tar")
    with pytest.raises(OSError, match="nowhere.invalid.*cannot be had: .*by hand"):
        download("Task09_Spleen", str(tmp_path / "data"))


def test_what_cannot_be_had(served, tmp_path):
    served.unlink()
    with pytest.raises(OSError, match="cannot be had: .*by hand"):
        download("Task09_Spleen", str(tmp_path / "data"))
    with pytest.raises(ValueError, match="there is no task 'Task9'; there are: Task01_BrainTumour"):
        download("Task9", str(tmp_path / "data"))
