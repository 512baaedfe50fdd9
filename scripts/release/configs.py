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
"""Configs that stand alone: overlays merged into train.json, inference.json and, as far as it needs, evaluate.json."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.utils import merge_kv

from scripts.preflight import unknown_among

__all__ = ["read_overlays", "standalone_configs"]

_OF_RUNS = ("initialize", "run", "finalize")
# A path outside the bundle, but for what is joined to another: @bundle_root + '/data'.
_ABSOLUTE = re.compile(r"""(?:^|(?<!\+)(?<!\+ )["'])((?:/|~|\.\.(?:/|$)|[A-Za-z]:[\\/])[^"']*)""")


def read_overlays(
    files: Sequence[str], overrides: Mapping[str, Any] | None = None
) -> tuple[list[tuple[str, Any]], dict[str, Any]]:
    """
    Args:
        files: overlays, the later ones go first.
        overrides: further keys, which go before them all.

    Returns:
        keys and values in the order in which they are to be set, and what the overlays say of themselves for
        metadata.json (their key ``_meta_``).

    Raises:
        FileNotFoundError: When an overlay does not exist.
        ValueError: When one cannot be read, or holds no keys.
    """
    pairs: list[tuple[str, Any]] = []
    described: dict[str, Any] = {}
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"There is no overlay {file}: give --task the path of one, as configs/tasks has.")
        try:
            overlay = dict(ConfigParser.load_config_file(file))
        except Exception as error:
            raise ValueError(f"{file} is no overlay that can be read: {error}") from error
        described.update(overlay.pop("_meta_", {}))
        pairs += overlay.items()
    pairs += (overrides or {}).items()
    for number, (key, value) in enumerate(pairs):
        if key == "dataset_dir" and Path(value).is_absolute():  # a plan's, of the computer where it was made
            pairs[number] = key, f"$@bundle_root + '/data/{Path(value).name}'"
    return [(key.replace("::", "#"), value) for key, value in pairs], described


def standalone_configs(folder: Path, pairs: Sequence[tuple[str, Any]]) -> dict[str, dict[str, Any]]:
    """
    Merge overlays as ``monai.bundle run`` does where they follow the configs on its command line. A config takes the
    keys that it has, those that something in it refers to, and none that it would not use. evaluate.json stays an
    overlay on train.json, as the model zoo has it; as it comes last then, it takes the keys that also set what it sets.

    Args:
        folder: of train.json, inference.json and evaluate.json.
        pairs: keys and values of the overlays; with "#" and "+" as there.

    Returns:
        the three configs by file name.

    Raises:
        ValueError: When no config has a key, a value is of the wrong kind to be merged, or is a path of this computer.
    """
    train, inference, evaluate = (
        ConfigParser.load_config_file(folder / f"{name}.json") for name in ("train", "inference", "evaluate")
    )
    evaluation = ConfigParser(copy.deepcopy(train))
    evaluation.update(copy.deepcopy(evaluate))
    last = {key: value for key, value in pairs if _set(evaluation, key, value) is None and _touches(key, evaluate)}
    kept = {key: value for key, value in evaluate.items() if key not in last}
    missed: list[dict[str, list[str]]] = [{}, {}]
    made = {
        "train.json": _merged(train, pairs, missed[0], evaluate),
        "inference.json": _merged(inference, pairs, missed[1]),
        "evaluate.json": {**kept, **copy.deepcopy(last)},
    }
    names = [key.lstrip("+").partition("#")[0] for config in made.values() for key in config]
    nested = (missed[0].keys() & missed[1].keys()) - last.keys()
    unknown = {key: [*missed[0][key], *missed[1][key]] for key in sorted(nested)}
    unknown |= {key: names for key, _ in pairs if key.removeprefix("+").partition("#")[0] not in names}
    for key, found in unknown.items():
        nearest = get_close_matches(key, found, n=1)
        hint = f" (did you mean {nearest[0]}?)" if nearest else ""
        raise ValueError(f"no config has or uses the key {key}{hint}.")
    for name, config in made.items():
        if place := next(filter(None, map(_ABSOLUTE.search, _strings(config))), None):
            raise ValueError(
                f"{name} would hold {place[1]}, a path of this computer: give its key a value below @bundle_root, "
                "in the overlay or with --overrides."
            )
    return made


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, (dict, list)):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _strings(value)


def _touches(key: str, evaluate: Mapping[str, Any]) -> bool:
    """Whether a key sets what evaluate.json sets, a part of it, or what it is a part of."""
    name = key.removeprefix("+") + "#"
    return any(name.startswith(other + "#") or (other + "#").startswith(name) for other in evaluate)


def _merged(
    config: dict[str, Any],
    pairs: Sequence[tuple[str, Any]],
    missed: dict[str, list[str]],
    overlay: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A config with the pairs in it; ``missed`` gains the nested keys that it does not have, and those it has there."""
    overlay = overlay or {}
    parser = ConfigParser(copy.deepcopy(config))
    for key, value in pairs:
        there = _set(parser, key, value)
        if there is not None:
            missed[key] = there
    made = dict(parser.get())
    while strays := [key for key in made if key not in config and not _needed(key, made, overlay)]:
        for key in strays:
            del made[key]
    return made


def _set(parser: ConfigParser, key: str, value: Any) -> list[str] | None:
    """Set or merge a value; where the config has no place for a nested key, say what it has there instead."""
    name = key.removeprefix("+")
    there = unknown_among(name, parser.get()) if "#" in name else None
    if there is not None:
        return there
    if "#" in name:
        try:
            place = parser[name.rpartition("#")[0]]
        except (KeyError, ValueError):  # there is nothing, or a reference
            return []
        if not isinstance(place, (dict, list)):
            return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "+key" without key: pruned later, or meant as key
        try:
            merge_kv(parser, key, copy.deepcopy(value))
        except ValueError as error:
            raise ValueError(f"{key} cannot be merged: {error}") from error
    return None


def _needed(key: str, config: Mapping[str, Any], overlay: Mapping[str, Any]) -> bool:
    referring = [{name: value for name, value in config.items() if name != key}]
    referring += [] if key in overlay else [dict(overlay)]  # what the overlay sets itself it has
    return key in _OF_RUNS or re.search(rf"[@%]{re.escape(key)}(?!\w)", json.dumps(referring)) is not None
