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

"""Seeded synthetic CT-like volumes, written as a data set in the Medical Segmentation Decathlon's layout.

The volumes are stand-ins for trying out a training, an evaluation or an inference without patient data. They show no
anatomy, and figures measured on them say nothing about a network's worth in practice.

Usage::

    python -m scripts.phantom --output_dir data/phantom --num_training 24 --num_test 6 --seed 0
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from pathlib import Path

import nibabel as nib
import numpy as np

from scripts.phantom_volume import GEOMETRIES, PHANTOM_CLASSES, RECIPE_VERSION, make_phantom

__all__ = ["write_phantoms"]

logger = logging.getLogger(__name__)


def write_phantoms(
    output_dir: str | os.PathLike,
    num_training: int = 24,
    num_test: int = 6,
    seed: int = 0,
    num_classes: int = 5,
) -> str:
    """Write a data set of phantoms in the Medical Segmentation Decathlon's layout.

    The folder gets ``dataset.json``, ``imagesTr``, ``labelsTr``, ``imagesTs`` and, under the names of the test images,
    their labels in ``labelsTs``. It appears whole or not at all. A case depends on ``seed`` and its own number alone: a
    larger data set begins with the cases of a smaller one. Orientation, tilt and anisotropy take turns over the cases.

    Args:
        output_dir: the folder to write: absent, empty, or complete from an earlier call with the same arguments, which
            is then left as it is.
        num_training: number of training cases, at least 1.
        num_test: number of test cases.
        seed: a number from 0 to 2**32 - 1.
        num_classes: number of label values, background included, from 2 to 7 (see ``PHANTOM_CLASSES``).

    Returns:
        The absolute path of the folder.

    Raises:
        ValueError: When an argument is out of range.
        FileExistsError: When ``output_dir`` is a file, or a folder that holds anything but the data set asked for.
    """
    for name, value, least in (
        ("num_training", num_training, 1),
        ("num_test", num_test, 0),
        ("seed", seed, 0),
        ("num_classes", num_classes, 2),
    ):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    if num_classes > len(PHANTOM_CLASSES):
        raise ValueError(
            f"num_classes must be from 2 to {len(PHANTOM_CLASSES)}, background included, got {num_classes}."
        )

    target = Path(output_dir).expanduser().resolve()
    content = _dataset_json(int(num_training), int(num_test), int(seed), int(num_classes))
    if _is_complete(target, content):
        logger.info(f"{target} already holds these phantoms: nothing to write.")
        return str(target)

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial-{uuid.uuid4().hex}"
    try:
        for folder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (partial / folder).mkdir(parents=True)
        for split, suffix, count in ((0, "Tr", num_training), (1, "Ts", num_test)):
            for index in range(count):
                orientation, oblique, anisotropic = GEOMETRIES[index % len(GEOMETRIES)]
                image, label, affine = make_phantom(
                    (seed, split, index), num_classes, orientation=orientation, oblique=oblique, anisotropic=anisotropic
                )
                name = _case_name(suffix, index)
                _save_nifti(image, affine, partial / f"images{suffix}" / name)
                _save_nifti(label, affine, partial / f"labels{suffix}" / name)
                logger.info(f"{name}: shape {image.shape}, spacing {_spacing_of(affine)} mm, {orientation}.")
        (partial / "dataset.json").write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
        if target.is_dir():
            target.rmdir()  # empty, as checked above; where another process filled it meanwhile this raises
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    logger.info(f"Wrote {num_training} training and {num_test} test phantoms to {target}.")
    return str(target)


def _case_name(suffix: str, index: int) -> str:
    return f"phantom_{'test_' if suffix == 'Ts' else ''}{index:03d}.nii.gz"


def _dataset_json(num_training: int, num_test: int, seed: int, num_classes: int) -> dict:
    names = [_case_name("Tr", index) for index in range(num_training)]
    return {
        "name": "Phantom (synthetic)",
        "description": "Synthetic CT-like stand-ins made by a program: no patient data, no anatomy.",
        "reference": "scripts/phantom.py of the SegResMamba bundle",
        "licence": "Apache-2.0",
        "release": f"{RECIPE_VERSION}.0",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {str(value): name for value, name in enumerate(PHANTOM_CLASSES[:num_classes])},
        "numTraining": num_training,
        "numTest": num_test,
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
        "test": [f"./imagesTs/{_case_name('Ts', index)}" for index in range(num_test)],
        "phantom": {
            "recipe_version": RECIPE_VERSION,
            "seed": seed,
            "num_training": num_training,
            "num_test": num_test,
            "num_classes": num_classes,
        },
    }


def _is_complete(target: Path, content: dict) -> bool:
    """Tell whether a folder holds the data set asked for already (True) or is free to be written (False).

    Raises:
        FileExistsError: When it is neither.
    """
    if not target.exists():
        return False
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file: give a folder that is absent or empty.")
    if not any(target.iterdir()):
        return False
    advice = "Give another output_dir, or delete this folder."
    try:
        found = json.loads((target / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("phantom"), dict):
        raise FileExistsError(f"{target} is not empty and holds no phantom data set. {advice}")
    if found["phantom"] != content["phantom"]:
        raise FileExistsError(
            f"{target} holds phantoms made with other arguments: {found['phantom']}, asked for now: "
            f"{content['phantom']}. {advice}"
        )
    expected = [path for item in content["training"] for path in item.values()]
    expected += [path.replace("imagesTs", folder) for path in content["test"] for folder in ("imagesTs", "labelsTs")]
    missing = [path for path in expected if not (target / path).is_file()]
    if missing:
        raise FileExistsError(
            f"{target} lacks {len(missing)} of its {len(expected)} files, {missing[0]} first. {advice}"
        )
    return True


def _save_nifti(array: np.ndarray, affine: np.ndarray, path: Path) -> None:
    """Write a NIfTI whose sform and qform both hold the affine, in scanner space and mm."""
    volume = nib.Nifti1Image(array, affine)
    volume.set_sform(affine, code="scanner")
    volume.set_qform(affine, code="scanner")
    volume.header.set_xyzt_units("mm")
    nib.save(volume, path)


def _spacing_of(affine: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(length), 2) for length in np.linalg.norm(affine[:3, :3], axis=0))


def _main(
    output_dir: str, num_training: int = 24, num_test: int = 6, seed: int = 0, num_classes: int = 5, **unknown: object
) -> None:
    """Write synthetic CT-like volumes as a data set in the Medical Segmentation Decathlon's layout.

    Args:
        output_dir: the folder to write: absent, empty, or complete from an earlier call with the same arguments.
        num_training: number of training cases.
        num_test: number of test cases.
        seed: a number from 0 to 2**32 - 1.
        num_classes: number of label values, background included, from 2 to 7.
        unknown: refused here, because fire reports an option that it does not know only after the call.
    """
    if unknown:
        raise SystemExit(f"Unknown options: {', '.join('--' + name for name in unknown)}. See --help.")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        write_phantoms(str(output_dir), num_training, num_test, seed, num_classes)
    except (FileExistsError, ValueError) as error:
        raise SystemExit(f"Error: {error}") from error


if __name__ == "__main__":
    from scripts.clear_errors import command

    command(_main)
