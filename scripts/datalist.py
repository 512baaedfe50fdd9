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

"""Data lists of a folder, with folds.

Unless another layout is named, it is the Medical Segmentation Decathlon's: a folder with ``dataset.json`` beside
``imagesTr``, ``labelsTr`` and, for test cases, ``imagesTs``. The ``training`` entries of dataset.json hold an ``image``
(one file, or a list of files, one per channel) and a ``label``. nnU-Net v2's raw folders are read as well: there
dataset.json lists no cases, but tells the files' ending, and the number of the channel ends an image's name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import load_decathlon_datalist, partition_dataset
from monai.utils import ensure_tuple

from scripts.layouts import layout_cases
from scripts.output import case_name

__all__ = ["case_groups", "cases_digest", "dataset_channels", "dataset_classes", "load_datalist"]

_SUBSETS = ("training", "validation", "all", "test")
_LAYOUT = (
    "expected the Medical Segmentation Decathlon's layout: a folder with dataset.json, imagesTr and labelsTr "
    "(and imagesTs for test cases); python -m scripts.download fetches the Decathlon's own tasks"
)


def load_datalist(
    dataset_dir: str | os.PathLike,
    subset: str = "training",
    fold: int = 0,
    num_folds: int = 5,
    seed: int = 0,
    layout: str = "decathlon",
    test_cases: Sequence[str] = (),
) -> list[dict]:
    """List the cases of a subset of a data set.

    The labelled cases are sorted by file name, shuffled by ``seed`` and dealt out to ``num_folds`` folds, so that the
    split depends on the names alone, whatever the order in dataset.json and wherever the folder lies. Cases of one
    patient stay together where the layout tells them, the Decathlon's by an entry's "group" in dataset.json.

    Args:
        dataset_dir: the data set's folder.
        subset: "training" for all folds but ``fold``, "validation" for ``fold``, "all" for every case of the folds,
            "test" for the test cases. In the Decathlon's layout these carry a label where ``labelsTs`` holds a file
            named like the image.
        fold: number of the fold to validate on, from 0. Only for "training" and "validation".
        num_folds: number of folds, at least 2. Only for "training" and "validation".
        seed: seed of the shuffle.
        layout: "decathlon", or one of :py:data:`scripts.layouts.LAYOUTS`.
        test_cases: names of labelled cases, the image's file name without suffix, or of patients, that belong to no
            fold: they are the "test" subset then, with the other cases of their patients.

    Returns:
        Dicts sorted by file name with the absolute paths "image" (a string or a list of strings) and "label" (a string)
        and whatever else the layout tells of the case.

    Raises:
        FileNotFoundError: When the folder, dataset.json, or a folder named by its entries does not exist.
        ValueError: When an argument is out of range, there are fewer cases than folds, dataset.json is malformed, or
            there is no case of the subset, or none of a name in ``test_cases``.
    """
    if subset not in _SUBSETS:
        raise ValueError(f"subset must be one of {', '.join(_SUBSETS)}, got {subset!r}.")
    unlabelled = subset == "test" and not test_cases
    if layout == "decathlon":
        items = _load_items(dataset_dir, "test" if unlabelled else "training")
    else:
        items = layout_cases(dataset_dir, layout, labelled=not unlabelled)
    if test_cases:
        wanted, names = set(map(str, test_cases)), [{_case_name(item), item.get("group")} for item in items]
        unknown = wanted.difference(*names)
        if unknown:
            raise ValueError(f"{dataset_dir} has no case {sorted(unknown)[0]!r}, which test_cases names.")
        own_group = case_groups(items)
        tested = {group for group, own in zip(own_group, names) if not own.isdisjoint(wanted)}
        items = [item for item, group in zip(items, own_group) if (group in tested) == (subset == "test")]
    if subset in ("all", "test"):
        return items

    for name, value, least in (("num_folds", num_folds, 2), ("fold", fold, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    if fold >= num_folds:
        raise ValueError(f"fold must be from 0 to {num_folds - 1} where num_folds={num_folds}, got {fold}.")
    own_group = case_groups(items)
    groups = list(dict.fromkeys(own_group))
    if len(groups) < num_folds:
        what = "labelled cases" if len(groups) == len(items) else "groups of labelled cases"
        raise ValueError(
            f"{dataset_dir} lists {len(groups)} {what}, too few for num_folds={num_folds}: lower num_folds."
        )
    folds = partition_dataset(range(len(groups)), num_partitions=num_folds, shuffle=True, seed=seed)
    held_out = {groups[index] for index in folds[fold]}
    return [item for item, group in zip(items, own_group) if (group in held_out) == (subset == "validation")]


def case_groups(items: Sequence[Mapping[str, Any]]) -> list[int | str]:
    """
    Args:
        items: cases, see :py:func:`load_datalist`.

    Returns:
        what the cases of one patient have in common: their "group", or the place in the list of a case without one.
    """
    return [item.get("group", index) for index, item in enumerate(items)]


def _case_name(item: Mapping[str, Any]) -> str:
    return item.get("case") or case_name(ensure_tuple(item["image"])[0])


def dataset_channels(dataset_dir: str | os.PathLike) -> int:
    """Count the image channels that dataset.json declares in "modality" (or, in nnU-Net v2's form, "channel_names").

    Args:
        dataset_dir: the folder that holds dataset.json.

    Returns:
        The number of channels.

    Raises:
        FileNotFoundError: When the folder or dataset.json does not exist.
        ValueError: When dataset.json is malformed or declares no channels.
    """
    path, content = _read_json(dataset_dir)
    channels = content.get("modality", content.get("channel_names"))
    if not isinstance(channels, (dict, list)) or not channels:
        raise ValueError(f"{path} declares no channels: expected 'modality', such as {{'0': 'CT'}}.")
    return len(channels)


def dataset_classes(dataset_dir: str | os.PathLike) -> dict[int, str]:
    """Read the label values that dataset.json declares in "labels", as value to name or, as nnU-Net v2 does, reversed.

    Args:
        dataset_dir: the folder that holds dataset.json.

    Returns:
        Names by label value, in rising order from 0. The background is added where value 0 is not declared.

    Raises:
        FileNotFoundError: When the folder or dataset.json does not exist.
        ValueError: When dataset.json is malformed, or its labels are not one name for each of the values 0, 1, 2, ...
    """
    path, content = _read_json(dataset_dir)
    labels = content.get("labels")
    if not isinstance(labels, dict) or not labels:
        raise ValueError(f"{path} declares no labels: expected 'labels', such as {{'0': 'background', '1': 'liver'}}.")
    pairs = list(labels.items())
    if "ignore" in labels:  # nnU-Net's, of voxels that no one has labelled
        raise ValueError(f"{path}: the label 'ignore' is not supported: it would become a class like any other.")
    if not all(_is_whole(key) for key in labels):
        pairs = [(value, name) for name, value in pairs]
    if not all(_is_whole(value) for value, _ in pairs):
        raise ValueError(f"{path}: every label must have one whole number as its value, got {labels}.")
    classes = {int(value): str(name) for value, name in pairs}
    if len(classes) < len(pairs):
        raise ValueError(f"{path}: two labels have the same value: {labels}.")
    classes.setdefault(0, "background")
    # Tables and files of metrics go by the name, in which commas are blanks, beside the mean.
    names = [name.replace(",", " ").strip() for name in classes.values()]
    strange = next((name for name in names if name in ("", "mean") or names.count(name) > 1), None)
    if strange is not None:
        raise ValueError(f"{path}: every class must have a name of its own, other than 'mean', got {strange!r}.")
    if sorted(classes) != list(range(len(classes))):
        raise ValueError(f"{path}: label values must run from 0 without a gap, got {sorted(classes)}.")
    return dict(sorted(classes.items()))


def cases_digest(cases: Sequence[Mapping[str, Any]]) -> str:
    """
    Args:
        cases: of :py:func:`load_datalist`.

    Returns:
        how many there are, and a hash of their names, wherever they lie.
    """
    names = "\n".join(sorted(_case_name(case) for case in cases))
    return f"{len(cases)} cases, {hashlib.sha256(names.encode()).hexdigest()[:12]}"


def _read_json(dataset_dir: str | os.PathLike) -> tuple[Path, dict]:
    """Return the path and the content of a folder's dataset.json."""
    folder = Path(os.path.abspath(os.path.expanduser(str(dataset_dir))))  # 20230101 is a number on the command line
    if not folder.is_dir():
        raise FileNotFoundError(f"The data set folder {folder} does not exist; {_LAYOUT}.")
    path = folder / "dataset.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no dataset.json; {_LAYOUT}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; {_LAYOUT}.")  # noqa: TRY004 (the file's fault, no caller's)
    return path, content


def _load_items(dataset_dir: str | os.PathLike, key: str) -> list[dict]:
    """Return the entries under a key of dataset.json with absolute paths, sorted by file name."""
    path, content = _read_json(dataset_dir)
    of_nnunet = key not in content and "file_ending" in content
    entries = content.get(key)
    if of_nnunet:
        entries = _nnunet_entries(path.parent, str(content["file_ending"]), dataset_channels(dataset_dir), key)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} lists no cases under {key!r}; {_LAYOUT}.")
    if key == "training":
        for entry in entries:
            if not isinstance(entry, dict) or not entry.get("image") or not entry.get("label"):
                raise ValueError(
                    f"{path}: every entry under 'training' must have an 'image' and a 'label', got {entry}."
                )
    items = entries
    if not of_nnunet:
        items = load_decathlon_datalist(path, is_segmentation=True, data_list_key=key, base_dir=path.parent)
    for item in items:
        if key == "test" and "label" not in item:
            label = path.parent / "labelsTs" / _label_name(item["image"])
            if label.is_file():
                item["label"] = str(label)
    if any(item.get("group") is not None for item in items):  # then all have one: batches are made of equal keys
        for item in items:
            group = item.get("group")
            item["group"] = ensure_tuple(item["image"])[0] if group is None else str(group)
    folders = {
        os.path.dirname(file) for item in items for k in ("image", "label") for file in ensure_tuple(item.get(k, ()))
    }
    missing = sorted(folder for folder in folders if not os.path.isdir(folder))
    if missing:
        raise FileNotFoundError(f"{path} names files in {', '.join(missing)}, which does not exist; {_LAYOUT}.")
    images = [ensure_tuple(item["image"]) for item in items]
    twice = next((image for image in images if images.count(image) > 1), None)
    if twice:  # its copies would lie on both sides of a fold
        raise ValueError(f"{path} lists {', '.join(twice)} more than once under {key!r}: list every case once.")
    names = [os.path.basename(image[0]) for image in images]
    alike = next((name for name in names if names.count(name) > 1), None)
    if alike:  # results are told apart by the name
        raise ValueError(f"{path} lists two files called {alike} under {key!r}: give each case a name of its own.")
    return sorted(items, key=lambda item: [(os.path.basename(file), file) for file in ensure_tuple(item["image"])])


def _nnunet_entries(folder: Path, ending: str, channels: int, key: str) -> list[dict]:
    """The cases of a raw folder of nnU-Net v2: every name before the channel's number, or in training a label's."""
    of = "Tr" if key == "training" else "Ts"
    images, labels = folder / f"images{of}", folder / f"labels{of}"
    numbered = re.compile(rf"([^.].*)_\d{{4}}{re.escape(ending)}")
    files = images.iterdir() if images.is_dir() else ()
    cases = {found[1] for file in files if (found := numbered.fullmatch(file.name))}
    if not cases:
        raise ValueError(f"{images} holds no image of nnU-Net's form, such as case_0000{ending}; {_LAYOUT}.")
    entries = []
    for case in sorted(cases):
        paths = [str(images / f"{case}_{channel:04}{ending}") for channel in range(channels)]
        label = labels / (case + ending)
        entry = {"image": paths if channels > 1 else paths[0], "case": case}
        entries.append(entry | ({"label": str(label)} if of == "Tr" or label.is_file() else {}))
    return entries


def _label_name(image: str | Sequence[str]) -> str:
    """Name of the label of an image: the image's own or, for one file per channel, without the channel's number."""
    if isinstance(image, str):
        return os.path.basename(image)
    return re.sub(r"_\d{4}(?=\.)", "", os.path.basename(image[0]))


def _is_whole(value: object) -> bool:
    if isinstance(value, str):
        return value.isdecimal()
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
