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
"""Folders as data sets of the field are really handed out, beside the Decathlon's: BraTS 2021, BTCV, ACDC."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["LAYOUTS", "NoCasesError", "NoLabelError", "layout_cases"]

_BRATS21_CHANNELS = ("flair", "t1", "t1ce", "t2")  # in the order of the Decathlon's brain tumours
_SUFFIXES = (".nii.gz", ".nii")


class NoCasesError(FileNotFoundError):
    """A folder holds no case of a layout, as opposed to one of which a file is missing."""


class NoLabelError(FileNotFoundError):
    """An image has no label where it should have one, which matters to a training alone."""


def layout_cases(dataset_dir: str | os.PathLike, layout: str, labelled: bool = True) -> list[dict]:
    """
    The cases of a folder that is laid out as the data set was handed out.

    - ``"brats21"``: ``BraTS2021_00000/BraTS2021_00000_{flair,t1,t1ce,t2,seg}.nii.gz``; the four modalities are the
      channels, in this order.
    - ``"btcv"``: ``Training/img/img0001.nii.gz`` and ``Training/label/label0001.nii.gz``, ``Testing/img``; also below
      ``RawData`` or another folder.
    - ``"acdc"``: ``training/patient001/patient001_frame01.nii.gz`` and ``..._frame01_gt.nii.gz``, ``testing/``; the two
      frames of a patient are cases of one group.

    Args:
        dataset_dir: the folder, or one above it.
        layout: one of ``LAYOUTS``.
        labelled: the cases to train on, with a label; else the test cases: those without one, and ACDC's ``testing``.

    Returns:
        Dicts with the absolute paths "image" (a string or a list of strings) and, where there is one, "label", the
        name of the "case", and the "group" whose cases belong to the same fold; sorted by case.

    Raises:
        NoCasesError: When the folder holds no such case.
        NoLabelError: When an image lacks its label.
        FileNotFoundError: When the folder does not exist, or another file of a case is missing.
        ValueError: When the layout is unknown.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be decathlon, {', '.join(LAYOUTS)}, got {layout!r}.")
    read, expected = LAYOUTS[layout]
    folder = Path(os.path.abspath(os.path.expanduser(str(dataset_dir))))
    if not folder.is_dir():
        raise FileNotFoundError(f"The data set folder {folder} does not exist; {expected}")
    cases = sorted(read(folder), key=lambda item: item["case"])
    chosen = [item for item in cases if ("label" in item and not item["test"]) == labelled]
    if not chosen:
        raise NoCasesError(f"{folder} holds no case {'with a label' if labelled else 'to test on'}; {expected}")
    names = [item["case"] for item in chosen]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"{folder} holds the case {twice} more than once: give --dataset_dir the folder of one copy.")
    return [{key: value for key, value in item.items() if key != "test"} for item in chosen]


def _brats21(folder: Path) -> list[dict]:
    cases = []
    for flair in _find(folder, r"(.+)_flair"):
        name = _stem(flair).removesuffix("_flair")
        files = {kind: _beside(flair, f"{name}_{kind}") for kind in (*_BRATS21_CHANNELS, "seg")}
        missing = [kind for kind in _BRATS21_CHANNELS if files[kind] is None]
        if missing:
            raise FileNotFoundError(f"{flair.parent} lacks {name}_{missing[0]}.nii.gz.")
        image = [str(files[kind]) for kind in _BRATS21_CHANNELS]
        item: dict = {"image": image, "case": name, "group": name, "test": False}
        cases.append(item | ({"label": str(files["seg"])} if files["seg"] else {}))
    return cases


def _btcv(folder: Path) -> list[dict]:
    cases = []
    for image in _find(folder, r"img\d+"):
        name = _stem(image)
        label = _beside(image.parent.parent / "label" / image.name, name.replace("img", "label"))
        if label is None and image.parent.parent.name == "Training":
            raise NoLabelError(f"{image} has no label beside it, in {image.parent.parent / 'label'}.")
        item: dict = {"image": str(image), "case": name, "group": name, "test": False}
        cases.append(item | ({"label": str(label)} if label else {}))
    return cases


def _acdc(folder: Path) -> list[dict]:
    cases = []
    for image in _find(folder, r"patient\d+_frame\d+"):
        name = _stem(image)
        label = _beside(image, f"{name}_gt")
        # The folder's own name too: it may be that of the test cases. One around it may be called so by chance.
        group, test = name.split("_")[0], "testing" in (folder.name, *image.relative_to(folder).parts)
        item: dict = {"image": str(image), "case": name, "group": group, "test": test}
        cases.append(item | ({"label": str(label)} if label else {}))
    return cases


LAYOUTS: dict[str, tuple[Callable[[Path], list[dict]], str]] = {
    "brats21": (
        _brats21,
        "expected BraTS 2021's folders, BraTS2021_00000/BraTS2021_00000_{flair,t1,t1ce,t2,seg}.nii.gz. They are handed "
        "out on registration, at https://www.synapse.org/#!Synapse:syn25829067.",
    ),
    "btcv": (
        _btcv,
        "expected BTCV's folders, Training/img/img0001.nii.gz and Training/label/label0001.nii.gz. They are handed out "
        "on registration, at https://www.synapse.org/#!Synapse:syn3193805.",
    ),
    "acdc": (
        _acdc,
        "expected ACDC's folders, training/patient001/patient001_frame01.nii.gz and patient001_frame01_gt.nii.gz. They "
        "are handed out on registration, at https://www.creatis.insa-lyon.fr/Challenge/acdc/.",
    ),
}
"""Layouts beside the Decathlon's: what reads them, and what is said where they are not found."""


def _find(folder: Path, pattern: str) -> Sequence[Path]:
    """Image files below a folder whose name without suffix matches."""
    found = []
    for root, folders, files in os.walk(folder, followlinks=True):
        # A link to what lies in the folder anyway would make of a test case one to train on, or never end.
        folders[:] = sorted(name for name in folders if not _leads_back(Path(root, name), folder))
        found += [
            Path(root, file)
            for file in sorted(files)
            # A dot begins what macOS adds to archives of its own.
            if file.endswith(_SUFFIXES) and not file.startswith(".") and re.fullmatch(pattern, _stem(Path(file)))
        ]
    return found


def _leads_back(path: Path, folder: Path) -> bool:
    """Whether a link's target lies in the folder, or around it."""
    if not path.is_symlink():
        return False
    target, folder = path.resolve(), folder.resolve()
    return target.is_relative_to(folder) or folder.is_relative_to(target)


def _stem(file: Path) -> str:
    return re.sub(r"\.nii(\.gz)?$", "", file.name)


def _beside(file: Path, stem: str) -> Path | None:
    """The file of another name, with either suffix, in the same folder."""
    return next((path for suffix in _SUFFIXES if (path := file.parent / f"{stem}{suffix}").is_file()), None)
