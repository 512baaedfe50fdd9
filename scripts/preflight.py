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

"""What is looked at before a run starts: the keys that it was given, and what it is about to work with."""

from __future__ import annotations

import inspect
import json
import logging
import os
import platform
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import monai.bundle
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.utils import optional_import
from packaging.specifiers import SpecifierSet

__all__ = ["check_keys", "executed_config", "preflight", "unknown_among", "version_differences"]

_OF_RUN = {
    name
    for function in (monai.bundle.run, monai.bundle.ConfigWorkflow.__init__)
    for name in inspect.signature(function).parameters
} - {"self", "override"}
_OF_TRACKING = {"tracking_uri", "experiment_name", "run_name", "save_execute_config"}


def check_keys(arguments: Sequence[str] | None = None) -> None:
    """
    Refuse keys on the command line of ``python -m monai.bundle run`` that no config has: MONAI takes them without a
    word, and the setting that was meant stays as it was. A new key is let pass where something refers to it
    (``@new_key``), below a component, whose argument it may be, and in a nested dictionary that has none like it.

    Args:
        arguments: a command line, its program first; default: this process's. Any other program's is let pass.

    Raises:
        ValueError: naming each unknown key and the nearest real one.
    """
    given = _given_to_run(sys.argv if arguments is None else arguments)
    if "config_file" not in given:
        return
    config = ConfigParser.load_config_files(given["config_file"])
    allowed = _OF_RUN | (_OF_TRACKING if "tracking" in given else set())
    referring = json.dumps([config, list(given.values())], default=str)
    faults = []
    for key in given.keys() - allowed:
        negated = key.removeprefix("no") if given[key] is True else key  # fire: --noresume for --resume False
        known = unknown_among(key.replace("::", "#"), config)
        if known is None or negated in config or re.search(rf"[@%]{re.escape(key)}(?!\w)", referring):
            continue
        nearest = get_close_matches(key, known, n=1)
        faults.append(f"--{key}" + (f" (did you mean --{nearest[0]}?)" if nearest else ""))
    if faults:
        files = given["config_file"]
        raise ValueError(
            f"there is no such key in {files if isinstance(files, str) else ', '.join(files)}: "
            f"{', '.join(sorted(faults))}."
        )


def executed_config(arguments: Sequence[str] | None = None) -> dict[str, Any] | None:
    """
    Args:
        arguments: a command line, its program first; default: this process's.

    Returns:
        the config that ``python -m monai.bundle run`` works with: its files one on another, and the command line's
        values in them. None for any other program.
    """
    given = _given_to_run(sys.argv if arguments is None else arguments)
    if "config_file" not in given:
        return None
    parser = ConfigParser(ConfigParser.load_config_files(given["config_file"]))
    parser.update({key: value for key, value in given.items() if key not in _OF_RUN})
    return dict(parser.get())


def _given_to_run(arguments: Sequence[str]) -> dict[str, Any]:
    """Values by key that ``monai.bundle run`` was given, also in a file of arguments; none for any other program."""
    if Path(arguments[0]).parts[-3:] != ("monai", "bundle", "__main__.py") or arguments[1:2] != ["run"]:
        return {}
    given = _given(arguments[2:])
    return ConfigParser.load_config_file(given["args_file"]) | given if "args_file" in given else given


def _given(arguments: Sequence[str]) -> dict[str, Any]:
    """Values by key, as fire reads them."""
    parse, _ = optional_import("fire.parser", name="DefaultParseValue")
    arguments = arguments[: arguments.index("--")] if "--" in arguments else arguments
    given: dict[str, Any] = {}
    for position, argument in enumerate(arguments):
        if _is_key(argument):
            key, equals, value = argument.lstrip("-").partition("=")
            follows = arguments[position + 1 : position + 2]
            bare = not equals and (not follows or _is_key(follows[0]))
            given[key.replace("-", "_")] = True if bare else parse(value if equals else follows[0])
    return given


def _is_key(argument: str) -> bool:
    return re.match(r"--?[A-Za-z_]", argument) is not None


def unknown_among(key: str, config: Any) -> list[str] | None:
    """
    Args:
        key: of a config, with "#" between its parts.
        config: its content.

    Returns:
        the keys that are there instead of one that is not; None where it is, or may be meant: below a component, whose
        argument it may be, or in a nested dictionary that has none like it.
    """
    parts = key.split("#")
    node = config
    for depth, part in enumerate(parts):
        if not isinstance(node, (dict, list)) or (depth > 0 and "_target_" in node) or part == "_meta_":
            return None
        children = node if isinstance(node, dict) else dict(zip(map(str, range(len(node))), node))
        if part not in children:
            new = depth > 0 and part == parts[-1] and isinstance(node, dict) and not get_close_matches(part, children)
            return None if new else ["#".join([*parts[:depth], name]) for name in children]
        node = children[part]
    return None


def preflight(
    metadata: str | os.PathLike,
    device: Any,
    weights: str | None = None,
    data: str | None = None,
    folders: Mapping[str, str | os.PathLike] | None = None,
) -> None:
    """
    Log in one piece what a run is about to work with, and warn of versions that the bundle was not tested with.

    Args:
        metadata: the bundle's metadata.json.
        device: that the network runs on.
        weights: what the check of the weights found.
        data: what the check of the data found.
        folders: by key of the config, where it is going to write; they are made.

    Raises:
        PermissionError: When a folder cannot be made or written to.
    """
    for key, folder in (folders or {}).items():
        try:
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=str(folder)):
                pass
        except OSError as error:
            raise PermissionError(
                f"nothing can be written to {folder} ({error.strerror}): give another --{key}."
            ) from error
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    lines = {
        "versions": f"Python {platform.python_version()}, PyTorch {torch.__version__}, MONAI {monai.__version__}",
        "device": f"{device}, {name}",
        "weights": weights,
        "data": data,
    }
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return
    logger = logging.getLogger(__name__)
    logger.info("\n".join(["Preflight", *(f"  {key:<9} {text}" for key, text in lines.items() if text)]))
    for difference in version_differences(metadata):
        logger.warning(f"Not tested with {difference}.")


def version_differences(metadata: str | os.PathLike) -> list[str]:
    """
    Args:
        metadata: a metadata.json.

    Returns:
        one phrase for each package that is missing or not of the versions given there.
    """
    content = json.loads(Path(metadata).read_text(encoding="utf-8"))
    wanted = {"monai": content["monai_version"], "torch": content["pytorch_version"], "numpy": content["numpy_version"]}
    imported = {"monai": monai.__version__, "torch": torch.__version__, "numpy": np.__version__}
    found = []
    for package, specifier in (wanted | content.get("required_packages_version", {})).items():
        asked = SpecifierSet(specifier if specifier[0] in "<>=~!" else f"=={specifier}")
        try:
            installed = imported.get(package) or version(package)
        except PackageNotFoundError:
            installed = "missing"
        if installed == "missing" or not asked.contains(installed.split("+")[0], prereleases=True):
            found.append(f"{package} {installed} (tested: {asked})")
    return found
