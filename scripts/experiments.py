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
"""Trainings that are compared: arms, folds and seeds of one plan, each run by MONAI's bundle runner."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.utils import ensure_tuple

from scripts.clear_errors import listed
from scripts.datalist import cases_digest, load_datalist
from scripts.evaluation import read_cases
from scripts.output import write_text

__all__ = ["OWN_KEYS", "Run", "check_configs", "evaluate", "experiments", "parsed", "planned_runs", "run_all"]

_ARM_KEYS = {"configs", "overrides", "folds", "seeds", "weights_of"}
_KEYS = _ARM_KEYS - {"weights_of"} | {"arms"}
OWN_KEYS = ("ckpt_dir", "dataset_dir", "fold", "output_dir", "resume", "seed")
"""Of the configs, that the runner itself sets."""


@dataclass(frozen=True)
class Run:
    """
    One training and its evaluation.

    Args:
        arm: its name in the plan.
        fold: the fold held out.
        seed: of the training; the folds do not depend on it (``split_seed`` of the configs).
        configs: config files behind configs/train.json, in this order.
        overrides: keys of the configs.
        weights_of: the run whose weights are evaluated; None for a training of its own.
    """

    arm: str
    fold: int
    seed: int
    configs: tuple[str, ...]
    overrides: Mapping[str, Any]
    weights_of: Run | None = None

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.arm}-fold{self.fold}-seed{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """What tells it from a run of the same name, as JSON has it."""
        other = {} if self.weights_of is None else {"weights_of": self.weights_of.arm}
        return json.loads(json.dumps({"configs": list(self.configs), "overrides": dict(self.overrides), **other}))


def planned_runs(plan: str) -> Iterator[Run]:
    """
    The runs of a plan: for each seed and fold, each arm, so that comparisons are complete early.

    Args:
        plan: YAML file with ``configs`` and ``overrides`` of every run, ``folds``, ``seeds``, and ``arms``: by name
            what an arm adds to ``configs`` and ``overrides``, and its own ``folds`` and ``seeds`` where they differ;
            ``weights_of`` names an arm above it whose weights it evaluates in place of a training, with that arm's
            ``configs`` and ``overrides`` below its own.

    Raises:
        ValueError: When the file is missing, cannot be read, has other keys or overrides what the runner sets, or
            ``weights_of`` names no training above.
    """
    if not Path(plan).is_file():
        raise ValueError(f"{plan}: there is no such file.")
    try:
        content = ConfigParser.load_config_file(plan)
    except Exception as error:  # of YAML or JSON, whichever the file is
        raise ValueError(f"{plan} cannot be read: {error}") from error
    given = content.get("arms") if isinstance(content, dict) else None
    if not isinstance(given, dict) or not all(isinstance(arm, (dict, type(None))) for arm in given.values()):
        raise ValueError(f"{plan}: expected 'arms', by name what each adds to 'configs' and 'overrides'.")
    arms = {str(name): arm or {} for name, arm in given.items()}
    for part in (content, *arms.values()):
        own = sorted(set(part.get("overrides") or {}).intersection(OWN_KEYS))
        if own:
            raise ValueError(f"{plan}: {own[0]} cannot be among the overrides: the runner sets it.")
    unknown = set(content) - _KEYS | {key for arm in arms.values() for key in set(arm) - _ARM_KEYS}
    if unknown or not arms:
        raise ValueError(
            f"{plan}: expected the keys {', '.join(sorted(_KEYS))}; unknown: {', '.join(sorted(unknown))}."
        )
    every = {key: _numbers(plan, key, content.get(key, 0)) for key in ("folds", "seeds")}
    runs: list[Run] = []
    for name, arm in arms.items():
        for seed in _numbers(plan, "seeds", arm.get("seeds", every["seeds"])):
            for fold in _numbers(plan, "folds", arm.get("folds", every["folds"])):
                base = Run("", fold, seed, ensure_tuple(content.get("configs") or ()), content.get("overrides") or {})
                other = None
                if "weights_of" in arm:
                    wanted = replace(base, arm=arm["weights_of"]).name
                    other = next((run for run in runs if run.name == wanted and run.weights_of is None), None)
                    if other is None:
                        raise ValueError(f"{plan}: weights_of of {name}: there is no training {wanted} above it.")
                    base = other
                configs = (*base.configs, *ensure_tuple(arm.get("configs") or ()))
                runs.append(Run(name, fold, seed, configs, {**base.overrides, **(arm.get("overrides") or {})}, other))
    # Stable: arms in their order, but what waits for another's weights behind the trainings.
    yield from sorted(runs, key=lambda run: (run.seed, run.fold, run.weights_of is not None))


def _numbers(plan: str, key: str, value: Any) -> tuple[int, ...]:
    numbers = ensure_tuple(value)
    if not all(isinstance(number, int) for number in numbers):
        raise ValueError(f"{plan}: {key} must be a whole number or a list of them, got {value!r}.")
    return numbers


def experiments(
    plan: str,
    dataset_dir: str,
    output_dir: str,
    results_dir: str,
    hours: float = 0.0,
    parallel: int = 1,
    arms: Sequence[str] = (),
) -> None:
    """
    Train and evaluate every run of a plan that has no result yet. A run that was interrupted goes on from its last
    checkpoint.

    Args:
        plan: YAML file, see :py:func:`planned_runs`.
        dataset_dir: the data set.
        output_dir: where each run's folder with checkpoints, curve and log is kept.
        results_dir: where each finished run writes one JSON file.
        hours: begin no run after this many; 0 for no limit.
        parallel: runs at a time, which share the CPU's cores.
        arms: run these alone; none for all.

    Raises:
        ValueError: When the plan is malformed or has none of ``arms``, or as :py:func:`run_all`.
        FileNotFoundError: As :py:func:`run_all`.
        ChildProcessError: When a training or an evaluation fails; the last lines of its log are in the message.
    """
    wanted = listed(arms)
    planned = list(planned_runs(plan))
    unknown = set(wanted).difference(run.arm for run in planned)
    if unknown:
        raise ValueError(f"{plan}: there is no arm {sorted(unknown)[0]!r}, which arms names.")
    runs = [run for run in planned if not wanted or run.arm in wanted]
    run_all(runs, dataset_dir, output_dir, results_dir, hours, parallel)


def run_all(
    runs: Sequence[Run], dataset_dir: str, output_dir: str, results_dir: str, hours: float = 0.0, parallel: int = 1
) -> None:
    """
    Train and evaluate runs that have no result yet, see :py:func:`experiments`.

    Args:
        runs: in their order.
        dataset_dir: the data set.
        output_dir: where each run's folder, of its name, is kept.
        results_dir: where each finished run writes one JSON file.
        hours: begin no run after this many; 0 for no limit.
        parallel: runs at a time.

    Raises:
        ChildProcessError: When a training or an evaluation fails.
        FileNotFoundError: When the weights of another run that a run evaluates are not there.
        ValueError: When a run's folder or result is that of another run with the same name, or the training in the
            folder had other data or overlays.
    """
    begin, failed = time.monotonic(), threading.Event()
    threads = max(1, (os.cpu_count() or 1) // parallel) if parallel > 1 else None

    for run in runs:
        check_configs(run.configs)
        training = run.weights_of or run
        result, folder = Path(results_dir) / f"{run.name}.json", Path(output_dir) / training.name
        begun = any((folder / file).is_file() for file in ("trained", "models/last.pt"))
        for file, place, settings, there in (
            (result, result, run.settings, result.is_file()),
            (folder / "settings.json", folder, _identity(training, dataset_dir), begun),
        ):
            unlike = _unlike(json.loads(file.read_text()), settings) if there and file.is_file() else ""
            if unlike:
                raise ValueError(
                    f"{file} is of a run with other settings ({unlike}): give other folders, or remove {place} with "
                    "what is in it."
                )

    def work(k: int) -> None:
        try:
            if not failed.is_set():  # of one that fails nothing further is begun
                step(k)
        except BaseException:
            failed.set()
            raise

    def step(k: int) -> None:
        run, note = runs[k], f"[{k + 1}/{len(runs)}] {runs[k].name}"
        result = Path(results_dir) / f"{run.name}.json"
        if result.is_file():
            print(f"{note}: done before\n", end="", flush=True)  # in one piece, beside other threads
        elif hours and time.monotonic() - begin > 3600 * hours:
            print(f"{note}: left for another time\n", end="", flush=True)
        else:
            print(f"{note}\n", end="", flush=True)
            folder = weights = Path(output_dir) / run.name
            if run.weights_of is None:
                _train(run, dataset_dir, folder, threads)
            else:
                if run.weights_of in runs:  # ahead of this run, so that it has begun
                    futures[runs.index(run.weights_of)].result()
                weights = Path(output_dir) / run.weights_of.name
                if failed.is_set():
                    return
                if not (weights / "trained").is_file():
                    raise FileNotFoundError(f"{run.name}: {weights} holds no training: run {run.weights_of.arm} there.")
            evaluate(run, dataset_dir, folder, threads=threads, weights=weights)
            write_text(result, json.dumps(_result(run, folder), indent=1) + "\n")

    futures: list[Future[None]] = []
    with ThreadPoolExecutor(parallel) as workers:
        for k in range(len(runs)):
            futures.append(workers.submit(work, k))
        try:
            wait(futures)
        except BaseException:  # Ctrl-C
            failed.set()
            raise
    for future in futures:
        future.result()


def evaluate(
    run: Run,
    dataset_dir: str,
    folder: Path,
    name: str = "evaluation",
    threads: int | None = None,
    weights: Path | None = None,
) -> None:
    """
    Run configs/evaluate.json with a run's settings.

    Args:
        run: its fold's cases are evaluated, unless its overrides say otherwise.
        dataset_dir: the data set.
        folder: the run's.
        name: of the folder in it that is written to.
        threads: of the CPU; None for PyTorch's choice.
        weights: the folder that holds them, in models/; default: the run's.

    Raises:
        ChildProcessError: When it fails.
    """
    places = {"ckpt_dir": str((weights or folder) / "models")}
    _bundle(run, dataset_dir, folder, name, ["configs/evaluate.json"], places, threads)


def check_configs(configs: Sequence[str]) -> None:
    """
    Args:
        configs: config files.

    Raises:
        ValueError: When there is no such file.
    """
    missing = next((file for file in configs if not Path(file).is_file()), None)
    if missing is not None:
        raise ValueError(f"There is no config file {missing}.")


def parsed(configs: Sequence[str], overrides: Mapping[str, Any]) -> ConfigParser:
    """
    Args:
        configs: config files behind configs/train.json, in this order.
        overrides: keys of the configs.

    Returns:
        the parser of what a training with them has.
    """
    parser = ConfigParser(ConfigParser.load_config_files(["configs/train.json", *configs]))
    parser.update(dict(overrides))
    return parser


def _unlike(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings that differ, in words; one that was not noted then does not count."""
    then, now = {"weights_of": None, **then}, {"weights_of": None, **now}
    pairs = [(key, then.get(key, now[key]), now[key]) for key in now if key != "overrides"]
    old, new = then.get("overrides", now["overrides"]), now["overrides"]
    pairs += [(key, old.get(key, "not set"), new.get(key, "not set")) for key in {**old, **new}]
    return "; ".join(f"{key}: {before} then, {after} now" for key, before, after in pairs if before != after)


def _identity(run: Run, dataset_dir: str) -> dict[str, Any]:
    """What a training must not change in when it goes on: its settings, its data, what its overlays say."""
    parser = parsed(run.configs, run.overrides)
    layout, tested = (parser.get_parsed_content(key) for key in ("layout", "test_cases"))
    try:
        cases = cases_digest(load_datalist(dataset_dir, "all", layout=layout, test_cases=tested))
    except (FileNotFoundError, ValueError):  # of which the training tells
        cases = "none that can be read"
    overlays = json.dumps([ConfigParser.load_config_file(file) for file in run.configs], sort_keys=True, default=str)
    return {
        **run.settings,
        "dataset_dir": os.path.realpath(os.path.expanduser(str(dataset_dir))),
        "cases": cases,
        "overlays_sha256": hashlib.sha256(overlays.encode()).hexdigest(),
    }


def _train(run: Run, dataset_dir: str, folder: Path, threads: int | None) -> None:
    """Train, or go on."""
    if (folder / "trained").is_file():
        return
    write_text(folder / "settings.json", json.dumps(_identity(run, dataset_dir), indent=1) + "\n")
    more = {"resume": True} if (folder / "models" / "last.pt").is_file() else {}
    train, evaluation = (ConfigParser.load_config_file(f"configs/{name}.json") for name in ("train", "evaluate"))
    own = evaluation.keys() - train.keys()
    kept = {key: value for key, value in run.overrides.items() if key not in own}
    _bundle(replace(run, overrides=kept), dataset_dir, folder, "training", [], more, threads)
    (folder / "trained").touch()


def _bundle(
    run: Run,
    dataset_dir: str,
    folder: Path,
    name: str,
    configs: list[str],
    more: Mapping[str, Any] | None = None,
    threads: int | None = None,
) -> None:
    overrides: dict[str, Any] = {**run.overrides, "fold": run.fold, "seed": run.seed, "dataset_dir": dataset_dir}
    overrides |= {"ckpt_dir": str(folder / "models"), "output_dir": str(folder / name), **(more or {})}
    files = ["configs/train.json", *configs, *run.configs]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(files)]
    for key, value in overrides.items():
        command += [f"--{key}", value if isinstance(value, str) else repr(value)]
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    with open(folder / f"{name}.log", "a") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    if code < 0:
        raise ChildProcessError(
            f"{name} of {run.name} was ended from outside (signal {-code}), as the system does where memory runs out; "
            "called again it goes on."
        )
    if code:
        lines = (folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
        raise ChildProcessError(f"{name} of {run.name} failed ({folder / name}.log):\n" + "\n".join(lines[-5:]))


def _result(run: Run, folder: Path) -> dict[str, Any]:
    """What is kept of a run: its settings, its cases' metrics, its course."""
    curve = []
    if (folder / "training" / "training_curve.csv").is_file():  # not where pictures are switched off
        with open(folder / "training" / "training_curve.csv", newline="") as table:
            curve = list(csv.DictReader(table))
    return {
        "arm": run.arm,
        "fold": run.fold,
        "seed": run.seed,
        **run.settings,
        "summary": json.loads((folder / "evaluation" / "summary.json").read_text()),
        "cases": read_cases(folder / "evaluation"),
        "curve": curve,
    }


if __name__ == "__main__":
    from scripts.clear_errors import command

    command(experiments)
