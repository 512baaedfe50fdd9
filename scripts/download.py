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
"""Fetch a task of the Medical Segmentation Decathlon: ``python -m scripts.download --help``."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from monai.apps import DecathlonDataset, download_url, extractall
from monai.apps.utils import HashCheckError

__all__ = ["download"]


def download(task: str, output_dir: str = "data") -> None:
    """
    Download and unpack a task of the Decathlon (http://medicaldecathlon.com, CC-BY-SA 4.0), checked by its MD5 sum.
    What is there already is not fetched again.

    Args:
        task: such as Task09_Spleen.
        output_dir: folder that will hold the task's folder and, beside it, the archive.

    Raises:
        ValueError: When there is no such task, what was downloaded has another MD5 sum, or the task's folder is there
            without its dataset.json.
        OSError: When the download fails.
    """
    if task not in DecathlonDataset.resource:
        raise ValueError(f"there is no task {task!r}; there are: {', '.join(DecathlonDataset.resource)}.")
    folder = Path(output_dir)
    if (folder / task / "dataset.json").is_file():
        print(f"{folder / task} is there already.")
        return
    if (folder / task).exists():
        raise ValueError(f"{folder / task} exists, but has no dataset.json: remove it, and it is unpacked anew.")
    url, archive = DecathlonDataset.resource[task], folder / f"{task}.tar"
    try:
        download_url(url, archive, DecathlonDataset.md5[task], hash_type="md5")
    except (HashCheckError, RuntimeError) as error:
        raise ValueError(
            f"{url} is not what was expected, or is damaged; delete {archive} and try again: {error}"
        ) from error
    except OSError as error:  # a URLError tells more in its reason
        reason = getattr(error, "reason", error)
        raise OSError(f"{url} cannot be had: {reason}. Download it by hand and put it at {archive}.") from error
    with TemporaryDirectory(prefix=f"{task}.", dir=folder) as unpacked:  # so that what is there is whole
        extractall(archive, unpacked, has_base=False)
        os.replace(Path(unpacked, task), folder / task)
    print(f"{folder / task} is ready: give it to a config as --dataset_dir.")


if __name__ == "__main__":
    from scripts.clear_errors import command

    command(download)
