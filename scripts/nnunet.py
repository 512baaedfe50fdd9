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

"""nnU-Net v2 (``pip install nnunetv2``), its own pipeline, on the folds and with the evaluation of the networks here.

Usage::

    python -m scripts.nnunet path/to/Task04_Hippocampus runs/nnunet --num_epochs 15 --iterations_per_epoch 50
"""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from monai.utils import ensure_tuple, optional_import

from scripts.datalist import dataset_channels, dataset_classes, load_datalist
from scripts.evaluation import read_cases, summary_table
from scripts.experiments import Run, evaluate
from scripts.output import case_name, write_text

__all__ = ["nnunet"]

_CONFIGURATION = "3d_fullres"
_OVERLAY = "configs/options/label_maps.yaml"
_SUBSETS = (("train", "training"), ("val", "validation"))  # nnU-Net's names and those here


def nnunet(
    dataset_dir: str,
    output_dir: str,
    results_dir: str = "",
    fold: int = 0,
    num_folds: int = 5,
    split_seed: int = 0,
    num_epochs: int = 1000,
    iterations_per_epoch: int = 250,
    device: str = "",
) -> None:
    """
    Plan, preprocess and train nnU-Net's full-resolution 3D network with the settings that it chooses itself, segment
    the fold held out as it does, with mirroring, and measure its label maps as configs/evaluate.json measures a
    network's. Called again it goes on behind the last epoch.

    Args:
        dataset_dir: the data set, in the Decathlon's layout.
        output_dir: where nnU-Net keeps its files, and evaluation/ is written.
        results_dir: where one JSON file for :py:mod:`scripts.report` is written; nowhere where nothing is given.
        fold: the fold held out.
        num_folds: number of folds.
        split_seed: of the folds; the defaults are those of configs/train.json.
        num_epochs: nnU-Net's default is 1000; its learning rate falls to 0 over as many.
        iterations_per_epoch: nnU-Net's default is 250. A training that was broken off loses at most one epoch.
        device: "cpu" or "cuda"; default: "cuda" where there is one.

    Raises:
        ValueError: When nnU-Net is not installed, or the folder holds a training with other settings.
    """
    training, found = optional_import("nnunetv2.run.run_training")
    if not found:
        raise ValueError("nnU-Net is not installed: pip install nnunetv2")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(output_dir).resolve()
    folds = {"num_folds": num_folds, "split_seed": split_seed}
    lengths = {"num_epochs": num_epochs, "iterations_per_epoch": iterations_per_epoch}
    settings = {"dataset_dir": os.path.abspath(str(dataset_dir)), **folds, **lengths}
    file = folder / "settings.json"
    if file.is_file() and json.loads(file.read_text()) != settings:  # it would go on from a state that is not its own
        raise ValueError(f"{file} is of a training with other settings: give another folder.")

    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[name] = str(folder / name)
    if device == "cpu":
        os.environ["nnUNet_compile"] = "false"
    name = _prepare(Path(str(dataset_dir)), folder, num_folds, split_seed)
    write_text(file, json.dumps(settings, indent=1) + "\n")

    trainer = training.get_trainer_from_args(name, _CONFIGURATION, fold, device=torch.device(device))
    trainer.num_epochs, trainer.num_iterations_per_epoch = num_epochs, iterations_per_epoch
    trainer.num_val_iterations_per_epoch = max(1, iterations_per_epoch // 5)  # as in nnU-Net
    trainer.save_every = 1
    training.maybe_load_checkpoint(trainer, continue_training=True, validation_only=False)
    if not (Path(trainer.output_folder) / "checkpoint_final.pth").is_file():
        trainer.run_training()
    trainer.perform_actual_validation(save_probabilities=False)

    overrides = {**folds, "label_maps": str(Path(trainer.output_folder) / "validation"), "device": "cpu"}
    evaluate(Run("nnunet", fold, 0, (_OVERLAY,), overrides), dataset_dir, folder, f"evaluation-fold{fold}")
    evaluation = folder / f"evaluation-fold{fold}"
    summary = json.loads((evaluation / "summary.json").read_text())
    plan = trainer.configuration_manager
    result: dict[str, Any] = {"arm": "nnunet", "fold": fold, "seed": 0, "nnunetv2": version("nnunetv2")}
    result |= {"patch_size": list(plan.patch_size), "batch_size": plan.batch_size, "spacing": list(plan.spacing)}
    result |= {**lengths, "parameters": sum(parameter.numel() for parameter in trainer.network.parameters())}
    result |= {"summary": summary, "cases": read_cases(evaluation), "curve": []}
    if results_dir:
        write_text(Path(results_dir) / f"nnunet-fold{fold}.json", json.dumps(result, indent=1) + "\n")
    print(summary_table(summary))


def _name(item: dict) -> str:
    return item.get("case") or case_name(ensure_tuple(item["image"])[0])  # as scripts.label_maps looks for it


def _prepare(dataset_dir: Path, folder: Path, num_folds: int, split_seed: int) -> str:
    """Describe the data where nnU-Net looks for them, without copying any, let it plan, and give it the folds."""
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api

    number, name = 1, f"Dataset001_{dataset_dir.resolve().name}"
    cases = {_name(item): item for item in load_datalist(dataset_dir, "all")}
    content = json.loads((dataset_dir / "dataset.json").read_text(encoding="utf-8"))
    channels = content.get("modality", content.get("channel_names"))
    channels = channels if isinstance(channels, dict) else dict(enumerate(channels))
    if any(len(ensure_tuple(item["image"])) < dataset_channels(dataset_dir) for item in cases.values()):
        raise ValueError(f"{dataset_dir}: nnU-Net reads each channel from a file of its own, here all lie in one.")
    described = {
        "channel_names": {str(number): channel for number, channel in channels.items()},
        "labels": {label: value for value, label in dataset_classes(dataset_dir).items()},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
        "dataset": {
            case: {"images": list(ensure_tuple(item["image"])), "label": item["label"]} for case, item in cases.items()
        },
    }
    write_text(folder / "nnUNet_raw" / name / "dataset.json", json.dumps(described, indent=1) + "\n")
    preprocessed = folder / "nnUNet_preprocessed" / name
    if not (preprocessed / "splits_final.json").is_file():  # which comes last
        processes = os.cpu_count() or 1
        api.extract_fingerprints([number], num_processes=processes, check_dataset_integrity=True, verbose=False)
        api.plan_experiments([number])
        api.preprocess([number], configurations=(_CONFIGURATION,), num_processes=(processes,))
        splits = []
        for fold in range(num_folds):
            lists = {key: load_datalist(dataset_dir, subset, fold, num_folds, split_seed) for key, subset in _SUBSETS}
            splits.append({key: [_name(item) for item in items] for key, items in lists.items()})
        write_text(preprocessed / "splits_final.json", json.dumps(splits, indent=1) + "\n")
    return name


if __name__ == "__main__":
    from scripts.clear_errors import command

    command(nnunet)
