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

import logging
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from monai.apps.utils import check_hash
from monai.bundle import ConfigParser
from monai.networks.utils import copy_model_state

from scripts.output import whole_file

__all__ = ["check_weights", "damaged_part", "load_pretrained", "read_weights", "shippable"]


def check_weights(
    checkpoint: str | os.PathLike, network: torch.nn.Module, large_files: str | os.PathLike | None = None
) -> str:
    """
    Make sure that a file's weights are there and fit a network, before anything is run with them.

    Args:
        checkpoint: file with a state dict, or with one under "model".
        network: the network that is to load it.
        large_files: the bundle's large_files.yml; a file that stands in it must have the hash given there.

    Returns:
        what was found, in one line.

    Raises:
        FileNotFoundError: When the file does not exist.
        ValueError: When it holds no weights, those of another network, or is not the file of large_files.yml.
    """
    _check_large_file(checkpoint, large_files)
    then = {name: tuple(value.shape) for name, value in read_weights(checkpoint, "--ckpt_dir or --checkpoint").items()}
    now = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    members = [len({name.split(".")[1] for name in names if name.startswith("networks.")}) for names in (then, now)]
    if all(members) and members[0] != members[1]:
        raise ValueError(
            f"{checkpoint} holds {members[0]} networks, not {members[1]}: give --num_networks {members[0]}."
        )
    for name in sorted(now.keys() | then.keys()):
        if now.get(name) != then.get(name):
            raise ValueError(
                f"{checkpoint} holds the weights of another network ({name}: {then.get(name, 'absent')} in the file, "
                f"{now.get(name, 'absent')} here): give the same channels, depths and other keys of the network, the "
                "same task overlay and data set as in training."
            )
    return f"{checkpoint}, {len(then)} tensors"


def _check_large_file(checkpoint: str | os.PathLike, large_files: str | os.PathLike | None) -> None:
    """A file that stands in large_files.yml must be there and have its hash."""
    if large_files is None or not os.path.isfile(large_files):
        return
    folder, place = Path(large_files).parent, Path(checkpoint).resolve()
    entries = ConfigParser.load_config_file(large_files).get("large_files") or []
    listed = next((entry for entry in entries if (folder / entry["path"]).resolve() == place), None)
    if listed is not None and not os.path.isfile(checkpoint):
        raise FileNotFoundError(
            f"There are no weights at {checkpoint}: fetch them from {listed['url']} with "
            f'python -m monai.bundle download_large_files --bundle_path "{folder}"'
        )
    if listed is None or not listed.get("hash_val"):
        return
    if not check_hash(checkpoint, listed["hash_val"], listed.get("hash_type") or "sha256"):
        raise ValueError(
            f"{checkpoint} is not the file that {large_files} describes (its hash differs): it is damaged, or a "
            "training has written its own there. Move those to another folder, to give as --ckpt_dir, and fetch this "
            "file again."
        )


def load_pretrained(
    checkpoint: str | os.PathLike, network: torch.nn.Module, large_files: str | os.PathLike | None = None
) -> None:
    """
    Fine-tuning: start from another training's weights, also where the number of classes or channels differs. What fits
    is loaded; what the network starts from scratch with, and what of the file is left, is logged.

    Args:
        checkpoint: file with a state dict, or with one under "model".
        network: changed in place.
        large_files: see :py:func:`check_weights`.

    Raises:
        FileNotFoundError: When the file does not exist.
        ValueError: When it holds no weights, none that fits, or is not the file of large_files.yml.
    """
    _check_large_file(checkpoint, large_files)
    weights = read_weights(checkpoint, "--pretrained")
    _, loaded, fresh = copy_model_state(network, weights, inplace=True)
    if not loaded:
        raise ValueError(f"{checkpoint} holds no weights that fit this network: is it another architecture or width?")
    left = sorted(weights.keys() - set(loaded))
    few = len(loaded) < len(fresh)
    logging.getLogger(__name__).log(
        logging.WARNING if few else logging.INFO,
        f"Fine-tuning from {checkpoint}: {len(loaded)} of {len(loaded) + len(fresh)} tensors loaded"
        f"{', and most of the network starts from scratch: give the channels and depths of that training' * few}; "
        f"not in the file with this shape: {_named(fresh)}; left in the file: {_named(left)}.",
    )


def _named(tensors: Sequence[str], most: int = 12) -> str:
    """Of another width it is nearly all of them."""
    more = f" and {len(tensors) - most} more" if len(tensors) > most else ""
    return (", ".join(tensors[:most]) or "none") + more


def read_weights(checkpoint: str | os.PathLike, key: str) -> dict[str, torch.Tensor]:
    """
    Args:
        checkpoint: file with a state dict, or with one under "model".
        key: what a user gives the file with, for the error.

    Returns:
        the state dict.

    Raises:
        FileNotFoundError: When the file does not exist.
        ValueError: When it holds no weights, or some that are no numbers.
    """
    if not os.path.isfile(checkpoint):
        raise FileNotFoundError(f"There are no weights at {checkpoint}: train first, or give {key} where they lie.")
    expected = "expected a state dict, or one under 'model', as torch.save writes it"
    damaged = damaged_part(checkpoint)
    if damaged is not None:
        raise ValueError(f"{checkpoint} is damaged (in {damaged}): fetch or make it again.")
    try:
        weights = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # many kinds, by what the file is; an UnpicklingError tells how to run its code
        reason = "it is empty" if os.path.getsize(checkpoint) == 0 else "it is damaged, or holds other things"
        raise ValueError(f"{checkpoint} holds no weights that can be read: {reason}; {expected}.") from error
    weights = weights.get("model", weights) if isinstance(weights, dict) else {}
    weights = weights if isinstance(weights, dict) else {}
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{checkpoint} holds no weights that can be read: {expected}.")
    spoilt = _not_finite(weights)
    if spoilt is not None:
        raise ValueError(f"{checkpoint} holds values in {spoilt} that are no numbers, or infinite.")
    return weights


def damaged_part(checkpoint: str | os.PathLike) -> str | None:
    """
    Args:
        checkpoint: file as torch.save writes it, an archive with a checksum of each part, at which torch does not look.

    Returns:
        the first part whose checksum is another; None where all is well, or the file is no such archive.
    """
    if not zipfile.is_zipfile(checkpoint):
        return None
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            return archive.testzip()
    except zipfile.BadZipFile as error:
        return str(error)


def _not_finite(weights: dict[str, torch.Tensor]) -> str | None:
    """Name of the first tensor with a value that is NaN or infinite."""
    return next((name for name, value in weights.items() if not torch.isfinite(value).all()), None)


def shippable(checkpoint: str, output: str, half: bool = True) -> str:
    """
    Write the weights alone of a checkpoint, for shipping: of ``models/last.pt`` those of the last step. Networks load
    them in half precision as they load others, and compute in their own.

    Args:
        checkpoint: file with a state dict, or with one under "model".
        output: file to write.
        half: in half precision, half as large.

    Returns:
        ``output``, so that a config may evaluate what it writes.

    Raises:
        FileNotFoundError: When the checkpoint does not exist.
        ValueError: When it holds no weights, or some that half precision cannot hold.
    """
    weights = read_weights(checkpoint, "checkpoint")
    if half:
        weights = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
        spoilt = _not_finite(weights)
        if spoilt is not None:
            raise ValueError(f"{checkpoint}: {spoilt} holds values too large for half precision: give --half False.")
    with whole_file(output) as part:
        torch.save(weights, part)
    print(f"{output}: {len(weights)} tensors, {os.path.getsize(output) / 1e6:.1f} MB")
    return output


if __name__ == "__main__":
    from scripts.clear_errors import command

    command(shippable)
