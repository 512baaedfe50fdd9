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
"""The model card of a release, in the layout of MONAI's model zoo, from its configs, metadata and evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scripts.output import markdown_table
from scripts.release.metadata import Described

__all__ = ["front_matter", "model_card"]


_CARD = """# Model Overview

{task}.

{description} {weights}

{intended_use}

## Data

- Source: {data_source}
- Images: {image_classes}
- Labels: {label_classes}

No data come with the bundle; `docs/data_license.txt` names licences.

#### Preprocessing

Orientation {orientation}, resampling to {spacing} mm, and the transforms under `intensity` in `configs/inference.json`.

## Training configuration

- Network: {network}
- Patches: {patch} voxels
{settings}

Loss, optimizer and augmentation stand in `configs/train.json`.

### Input

Channels: {channels}. Images larger than a patch are processed by a sliding window.

### Output

Channels of logits:

{outputs}

Inference writes a label map on the image's own grid: {labels}.

## Performance

{performance}

## MONAI Bundle Commands

{fetch}The commands run in the bundle's folder, and every key of a config can be overridden on the command line; see the
[MONAI Bundle documentation](https://docs.monai.io/en/stable/mb_specification.html).

#### Execute inference

```bash
python -m monai.bundle run --config_file configs/inference.json --input path/to/images
```

#### Execute training

```bash
python -m monai.bundle run --config_file configs/train.json --dataset_dir path/to/data
```

#### Override the `train` config to execute multi-GPU training

```bash
torchrun --standalone --nproc_per_node=2 -m monai.bundle run \\
    --config_file "['configs/train.json','configs/multi_gpu_train.json']" --dataset_dir path/to/data
```

#### Override the `train` config to execute evaluation with the trained model

```bash
python -m monai.bundle run \\
    --config_file "['configs/train.json','configs/evaluate.json']" --dataset_dir path/to/data
```

# References

{listed}

# License

{copyright}

Licensed under the Apache License, Version 2.0; see `LICENSE`.
"""


def front_matter() -> str:
    """What the Hugging Face Hub reads at the head of a model card."""
    tags = "".join(f"- {tag}\n" for tag in ("monai", "medical", "segmentation", "3d", "mamba"))
    return f"---\nlicense: apache-2.0\nlibrary_name: monai\npipeline_tag: image-segmentation\ntags:\n{tags}---\n\n"


def model_card(
    name: str,
    metadata: Mapping[str, Any],
    described: Described,
    train: Mapping[str, Any],
    summary: Mapping[str, Any] | None,
    weights: str | None,
    url: str | None,
    weights_url: str | None,
) -> str:
    """
    Args:
        name: of the release.
        metadata: content of its metadata.json.
        described: of the release.
        train: content of its train.json.
        summary: content of the evaluation's summary.json, if there is one.
        weights: their path in the bundle; None where it brings none.
        url: where the zip will lie, if that is known.
        weights_url: where the weights lie, if not in the zip.

    Returns:
        the card, in Markdown.
    """
    image = metadata["network_data_format"]["inputs"]["image"]
    settings = {key: train[key] for key in ("max_epochs", "batch_size", "learning_rate", "precision")}
    settings = {key: value for key, value in settings.items() if not str(value).startswith("$")}  # depends on the GPU
    patch, spacing = (" x ".join(f"{n:g}" for n in given) for given in (described.patch_size, described.spacing))
    fetch = [f"python -m monai.bundle download --name {name} --url {url} --bundle_dir ."] if url else []
    fetch += [f"python -m monai.bundle download_large_files --bundle_path {name}"] if weights_url else []
    return _CARD.format(
        **metadata,
        weights=f"Its weights are `{weights}`." if weights else "It brings no trained weights: train first.",
        network=described.network,
        orientation=described.orientation,
        spacing=spacing,
        patch=patch,
        settings="\n".join(f"- `{key}`: `{value}`" for key, value in settings.items()),
        channels=", ".join(image["channel_def"].values()),
        outputs="\n".join(f"- {k}: {output}" for k, output in enumerate(described.output_names)),
        labels=", ".join(f"{value} {label}" for value, label in enumerate(described.label_names) if label),
        performance=_performance(summary),
        fetch="\n".join(["#### Download\n", "```bash", *fetch, "```\n\n"]) if fetch else "",
        listed="\n\n".join(f"[{k}] {text}" for k, text in enumerate(metadata["references"], start=1)),
    )


def _performance(summary: Mapping[str, Any] | None) -> str:
    """A table of an evaluation: mean, standard deviation, and 95 % confidence interval where the summary has it."""
    if summary is None:
        return "No evaluation came with this release."
    metrics = [metric for metric in summary if metric != "cases"]
    rows = [[label, *(_cell(summary[metric][label]) for metric in metrics)] for label in summary[metrics[0]]]
    table = markdown_table(["class", *metrics], rows)
    return (
        f"{summary['cases']} cases, mean ± standard deviation (95 % confidence interval of the mean), distances in mm; "
        f"`docs/evaluation.md` defines the metrics.\n\n{table}"
    )


def _cell(values: Mapping[str, float]) -> str:
    interval = f" ({values['ci95_low']:.3f} to {values['ci95_high']:.3f})" if "ci95_low" in values else ""
    return f"{values['mean']:.3f} ± {values['std']:.3f}{interval}"
