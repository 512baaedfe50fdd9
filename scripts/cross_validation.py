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
"""Cross-validation: every fold trained and evaluated, its networks joined in an ensemble."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import ensure_tuple

from scripts.datalist import load_datalist
from scripts.ensemble import join_weights
from scripts.evaluation import statistics, summary_table
from scripts.experiments import OWN_KEYS, Run, check_configs, evaluate, parsed, run_all
from scripts.output import write_text
from scripts.report import read_evaluations

__all__ = ["cross_validation"]


def cross_validation(
    dataset_dir: str,
    output_dir: str,
    config_file: Sequence[str] = (),
    num_folds: int | None = None,
    seed: int = 0,
    parallel: int = 1,
    **overrides: Any,
) -> None:
    """
    Train and evaluate all folds, one after the other, and join their networks. Called again it goes on where it
    stopped: finished folds are left as they are, an interrupted training resumes.

    In ``output_dir``: for each fold a folder with models, training and evaluation; summary.json, over all cases, each
    segmented by the network that has not seen it; models/ensemble.pt, for configs/options/ensemble.yaml; and, where the
    data set has test cases with labels, test/ with the ensemble's evaluation on them.

    Args:
        dataset_dir: the data set.
        output_dir: where to write.
        config_file: overlays behind configs/train.json, such as that of the task.
        num_folds: number of folds; default: that of the configs.
        seed: of the trainings.
        parallel: folds at a time, see :py:func:`scripts.experiments.experiments`.
        overrides: further keys of the configs.

    Raises:
        ChildProcessError: When a training or an evaluation fails; the last lines of its log are in the message.
        ValueError: When the data set is malformed, or the folder holds a cross-validation with other settings.
    """
    own = sorted(set(overrides).intersection((*OWN_KEYS, "checkpoint")))
    if own:
        raise ValueError(
            f"{own[0]} cannot be set here: each fold has its own, and is measured with its models/model.pt."
        )
    configs = ensure_tuple(config_file)
    check_configs(configs)
    if num_folds is None:
        num_folds = parsed(configs, overrides).get_parsed_content("num_folds")
    overrides = {**overrides, "num_folds": num_folds}
    runs = [Run("cross_validation", fold, seed, configs, overrides) for fold in range(num_folds)]
    folder = Path(output_dir)
    strangers = {file.stem for file in (folder / "results").glob("*.json")} - {run.name for run in runs}
    if strangers:
        raise ValueError(f"{folder}/results holds {min(strangers)}, of another cross-validation: give another folder.")
    done = all((folder / "results" / f"{run.name}.json").is_file() for run in runs)
    run_all(runs, dataset_dir, output_dir, str(folder / "results"), parallel=parallel)

    ((_, metrics),) = read_evaluations(folder / "results").items()
    summary: dict[str, Any] = {"cases": len(next(iter(metrics.values())))}
    for name, cases in metrics.items():
        labels = next(iter(cases.values()))
        summary[name] = {label: statistics(np.array([case[label] for case in cases.values()])) for label in labels}
    write_text(folder / "summary.json", json.dumps(summary, indent=4) + "\n")
    print(f"{summary['cases']} cases, each by the network that has not seen it, mean +- standard deviation:")
    print(summary_table(summary))

    (folder / "models").mkdir(exist_ok=True)
    join_weights([folder / run.name / "models" / "model.pt" for run in runs], folder / "models" / "ensemble.pt")
    if _has_test_labels(configs, overrides, dataset_dir):
        more = {**overrides, "val_subset": "test", "num_networks": num_folds}
        joint = Run("ensemble", 0, seed, (*configs, "configs/options/ensemble.yaml"), more)
        tested = folder / "test" / "summary.json"
        if not (done and tested.is_file()):
            evaluate(joint, dataset_dir, folder, "test")
        print(f"The ensemble on the test cases:\n{summary_table(json.loads(tested.read_text()))}")
    print(f"Written to {folder}.")


def _has_test_labels(configs: Sequence[str], overrides: dict[str, Any], dataset_dir: str) -> bool:
    parser = parsed(configs, overrides)
    try:
        cases = load_datalist(dataset_dir, "test", layout=parser["layout"], test_cases=parser["test_cases"])
    except (ValueError, FileNotFoundError) as error:  # there are none, as a rule
        print(f"The ensemble is not measured on test cases: {error}")
        return False
    return all("label" in case for case in cases)


if __name__ == "__main__":
    from scripts.clear_errors import command

    command(cross_validation)
