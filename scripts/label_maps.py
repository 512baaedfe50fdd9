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

import os
from pathlib import Path
from typing import Any

from monai.utils import ensure_tuple

from scripts.datalist import load_datalist
from scripts.output import IMAGE_SUFFIXES, case_name

__all__ = ["load_label_maps"]


def load_label_maps(label_maps: str | os.PathLike, **arguments: Any) -> list[dict]:
    """
    The labelled cases of a data set with the label maps that some program has written for them in the images' place, so
    that configs/evaluate.json measures these (configs/options/label_maps.yaml).

    Args:
        label_maps: their folder. A case's file is named like its image, or, as inference does, with ``_seg`` behind it:
            ``case.nii.gz`` or ``case_seg.nii.gz``.
        **arguments: of :py:func:`scripts.datalist.load_datalist`.

    Returns:
        what that function does, with the label map's path as "image", and the image's file name as "image_name".

    Raises:
        FileNotFoundError: when the folder or the label map of a case is missing.
        ValueError: when no folder is given, or cases have no label.
    """
    if not label_maps:
        raise ValueError("give --label_maps, the folder of the label maps to evaluate.")
    folder = Path(label_maps)
    if not folder.is_dir():
        raise FileNotFoundError(f"--label_maps {folder} does not exist.")
    cases = []
    for item in load_datalist(**arguments):
        image = ensure_tuple(item["image"])[0]
        name = item.get("case") or case_name(image)
        if "label" not in item:
            raise ValueError(f"case {name} has no label to compare with: choose another --val_subset.")
        files = [folder / f"{name}{end}{suffix}" for suffix in IMAGE_SUFFIXES for end in ("", "_seg")]
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{folder} holds no label map of case {name}: expected {files[0].name}.")
        cases.append({**item, "image": str(found), "image_name": os.path.basename(image)})
    return cases
