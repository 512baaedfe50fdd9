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
"""What a release says of itself for programs: metadata.json of its task, and its SBOM."""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.utils import ensure_tuple

__all__ = ["Described", "describe", "next_version", "release_metadata", "sbom", "scores"]


@dataclass(frozen=True)
class Described:
    """
    What inference.json says of network, input and output.

    Args:
        network: name of its class.
        in_channels: of the image.
        output_names: of the logits' channels, classes or regions.
        label_names: by label value, as inference writes them; empty where a value is not used.
        patch_size: voxels.
        spacing: mm.
        orientation: axis codes.
        checkpoint: the weights' path inside the bundle.
    """

    network: str
    in_channels: int
    output_names: tuple[str, ...]
    label_names: tuple[str, ...]
    patch_size: tuple[int, ...]
    spacing: tuple[float, ...]
    orientation: str
    checkpoint: str


def describe(inference: Mapping[str, Any]) -> tuple[Described, torch.nn.Module]:
    """
    Args:
        inference: content of a standalone inference.json.

    Returns:
        what it says, where there are no data that could say otherwise, and its network on the CPU.

    Raises:
        ValueError: When the names of the classes do not go with the network's channels.
    """
    parser = ConfigParser({**inference, "dataset_dir": "", "input": "", "device": "cpu"})
    names, labels, out = (parser.get_parsed_content(key) for key in ("class_names", "label_names", "out_channels"))
    if out != len(names):  # regions: the background is none of them
        names = names[1:]
    if out != len(names):
        raise ValueError(f"the network has {out} output channels, class_names {len(names)} beside the background.")
    definition = parser.get_parsed_content("network_def")
    described = Described(
        network=type(getattr(definition, "network", definition)).__name__,  # of AnySize, the one inside it
        in_channels=parser.get_parsed_content("in_channels"),
        output_names=tuple(names),
        label_names=tuple(labels),
        patch_size=tuple(ensure_tuple(parser.get_parsed_content("patch_size"))),
        spacing=tuple(ensure_tuple(parser.get_parsed_content("spacing"))),
        orientation=parser.get_parsed_content("orientation"),
        checkpoint=Path(parser.get_parsed_content("checkpoint")).as_posix(),
    )
    return described, parser.get_parsed_content("network")


def next_version(metadata: Mapping[str, Any], version: str | None, changelog: str | None) -> dict[str, Any]:
    """
    Args:
        metadata: content of metadata.json.
        version: of the release; default: that of metadata.json.
        changelog: what is new in it, where the changelog does not say so yet.

    Returns:
        "version" and "changelog" of the release.

    Raises:
        ValueError: When the version is not of three numbers, older than one in the changelog, or not described there.
    """
    version = metadata["version"] if version is None else str(version)
    if not re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}", version):
        raise ValueError(f"--version {version} is no semantic version of three numbers, such as 1.0.0.")
    known = metadata["changelog"]
    latest = max(known, key=_numbers)
    if _numbers(version) < _numbers(latest):
        raise ValueError(f"--version {version} is older than {latest} of the changelog in configs/metadata.json.")
    if version in known and changelog is not None:
        raise ValueError(f"the changelog in configs/metadata.json has {version} already: leave --changelog out.")
    if version not in known and not changelog:
        raise ValueError(f'{version} is not in the changelog of configs/metadata.json: give --changelog "what is new".')
    return {"version": version, "changelog": known if version in known else {version: changelog, **known}}


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


def scores(summary: Mapping[str, Any], described: Described) -> dict[str, float]:
    """
    Args:
        summary: content of an evaluation's summary.json.
        described: of the release.

    Returns:
        means over the cases by metric, over the classes and of each; and the number of cases, "cases".

    Raises:
        ValueError: When it is no such summary, of other classes, or a mean or standard deviation is no number.
    """
    metrics = {metric: classes for metric, classes in summary.items() if metric != "cases"}
    if not metrics or not isinstance(summary.get("cases"), int):
        raise ValueError("--evaluation is no summary.json of an evaluation.")
    wanted = {_plain(name) for name in described.output_names} | {"mean"}
    found = {}
    for metric, classes in metrics.items():
        if not isinstance(classes, Mapping) or not all(isinstance(values, Mapping) for values in classes.values()):
            raise ValueError("--evaluation is no summary.json of an evaluation.")
        strange = next((name for name in classes if _plain(name) not in wanted), None)
        if strange is not None:
            raise ValueError(f"--evaluation is of other classes than the release: {strange}.")
        missing = next((name for name in next(iter(metrics.values())) if name not in classes), None)
        if missing is not None:
            raise ValueError(f"--evaluation has no {metric} for {missing}.")
        for name, values in classes.items():
            lacking = next((part for part in ("mean", "std") if not _is_finite(values.get(part))), None)
            if lacking is not None:
                raise ValueError(f"--evaluation has no {lacking} of {metric} for {name}.")
            short = metric.removeprefix("val_").removeprefix("mean_") + ("_mm" if "hd95" in metric else "")
            key = f"mean_{short}" + ("" if name == "mean" else f"_{_plain(name).replace(' ', '_')}")
            found[key] = round(values["mean"], 4)
    return {**found, "cases": summary["cases"]}


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _plain(name: str) -> str:
    return name.replace(",", " ").casefold()  # as the evaluation's CSV files have it


def release_metadata(
    metadata: Mapping[str, Any],
    described: Described,
    own: Mapping[str, Any],
    title: str | None,
    found: Mapping[str, float],
) -> dict[str, Any]:
    """
    Args:
        metadata: content of metadata.json, with version and changelog of the release.
        described: of the release.
        own: what the task says of itself: keys of metadata.json, and besides its "title", "modality" and
            "channel_names" of its images; its "references" are added to those there.
        title: of the task where it gives none; None for the plain configs, which metadata.json already describes.
        found: what was measured.

    Returns:
        content of the release's metadata.json.

    Raises:
        ValueError: When there is not a name for each channel, or the plain configs were given another task's classes.
    """
    inputs = metadata["network_data_format"]["inputs"]["image"]
    plain = title is None
    modality = own.get("modality", inputs["modality"] if plain else "n/a")
    channels = [f"channel {k}" for k in range(described.in_channels)] if described.in_channels > 1 else ["image"]
    channels = list(own.get("channel_names", channels))
    if len(channels) != described.in_channels:
        raise ValueError(f"_meta_#channel_names has {len(channels)} names, the image {described.in_channels} channels.")
    made = dict(metadata)
    outputs = metadata["network_data_format"]["outputs"]["pred"]
    if plain and list(outputs["channel_def"].values()) != list(described.output_names):
        raise ValueError("the classes are not those of configs/metadata.json: give --task an overlay with them.")
    if not plain:
        labels = [f"{value} {name}" for value, name in enumerate(described.label_names) if name]
        step = " x ".join(f"{step:g}" for step in described.spacing)
        image = ", ".join(["image" if modality == "n/a" else modality, *(channels if len(channels) > 1 else [])])
        task = f"Segmentation of {', '.join(filter(None, described.label_names[1:]))} with {described.network}"
        kind = "class" if described.output_names == described.label_names else "region"
        made |= {
            "name": f"{described.network}: {own.get('title', title)} segmentation",
            "task": task,
            "description": f"{described.network} with the configs, transforms and checks of the SegResMamba bundle, "
            "which needs no compiled extension.",
            "data_source": "not stated",
            "data_license": "not stated",
            "intended_use": metadata["intended_use"].partition(" Limits:")[0],  # of other weights
            "image_classes": f"{image}; {step} mm in the network",
            "label_classes": f"single channel, {', '.join(labels)}",
            "pred_classes": f"logits of {len(described.output_names)} channels, one for each {kind}; written as a "
            "label map of one channel",
        }
    made |= {key: value for key, value in own.items() if key not in ("title", "modality", "channel_names")}
    of_method = [text for text in metadata["references"] if plain or "Decathlon" not in text]  # the plain configs' data
    made["references"] = list(dict.fromkeys([*of_method, *own.get("references", [])]))
    if found or not plain:
        made["eval_metrics"] = dict(found)
    made["network_data_format"] = {
        "inputs": {"image": _tensor({**inputs, "modality": modality}, channels, described)},
        "outputs": {"pred": _tensor(outputs, described.output_names, described)},
    }
    return made


def _tensor(content: Mapping[str, Any], names: Sequence[str], described: Described) -> dict[str, Any]:
    shape, channel_def = list(described.patch_size), {str(k): name for k, name in enumerate(names)}
    return {**content, "num_channels": len(names), "spatial_shape": shape, "channel_def": channel_def}


def sbom(name: str, metadata: Mapping[str, Any], requirements: str, weights: Mapping[str, str]) -> dict[str, Any]:
    """
    Args:
        name: of the release.
        metadata: its metadata.json's content.
        requirements: requirements.txt, with the exact versions that the bundle was tested with.
        weights: SHA-256 by the path of a file of weights.

    Returns:
        a CycloneDX 1.5 bill of materials: the bundle, the packages that it needs and the weights that it brings.
    """
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", requirements, flags=re.MULTILINE))
    asked = {package: metadata[f"{package}_version"] for package in ("monai", "numpy")}
    asked["torch"] = metadata["pytorch_version"]
    components: list[dict[str, Any]] = []
    for package, versions in sorted((asked | metadata["required_packages_version"]).items()):
        tested = asked.get(package) or pins.get(package)
        purl = f"pkg:pypi/{package.lower().replace('_', '-')}" + (f"@{tested}" if tested else "")
        components.append({"type": "library", "bom-ref": purl, "name": package, "purl": purl})
        components[-1] |= {"version": tested} if tested else {}
        components[-1]["properties"] = [{"name": "segresmamba:accepted_versions", "value": versions}]
    for path, digest in weights.items():
        hashes = [{"alg": "SHA-256", "content": digest}]
        components.append({"type": "machine-learning-model", "bom-ref": path, "name": path, "hashes": hashes})
    reference = f"{name}@{metadata['version']}"
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": uuid.uuid5(uuid.NAMESPACE_URL, reference + "".join(weights.values())).urn,
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": reference,
                "name": name,
                "version": metadata["version"],
                "description": metadata["name"],
                "licenses": [{"license": {"id": "Apache-2.0"}}],
            }
        },
        "components": components,
        "dependencies": [{"ref": reference, "dependsOn": [component["bom-ref"] for component in components]}],
    }
