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

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from scripts.host_memory import retain_freed_memory
from scripts.output import markdown_table
from scripts.selective_scan import selective_scan_channels_last

from .apart import run_apart
from .measuring import describe, file_name, interleaved, machine, write_results
from .networks import build_network
from .steps import inference_step, training_step

__all__ = ["cpu"]

_COMPACT = {"channels": [16, 32, 64, 128]}  # a third of the paper's width


def cpu(rounds: int = 3, output_dir: str = "docs/benchmarks", name: str = "") -> None:
    """
    What the scan engines and SegResMamba cost on this CPU, and against what. Everything that is compared runs in turn,
    round by round; the medians and their ratios are what counts.

    Args:
        rounds: timed runs of each row after one warm-up (the token loop, which takes longest, is timed twice).
        output_dir: where ``cpu-<name>.json`` and ``.md`` are written.
        name: name of the machine in the files' names; default: its processor's.
    """
    retain_freed_memory()  # as the configs do
    torch.manual_seed(0)
    results = {
        "machine": machine(),
        "scan": _scan(rounds),
        "inference": _inference(rounds),
        "training": _training(rounds),
        "training_memory": _training_memory(),
    }
    write_results(results, _markdown(results), f"cpu-{name or file_name(results['machine']['name'])}", output_dir)


def _scan(rounds: int) -> dict:
    """The op alone, at SegResMamba's first level for a 128^3 patch."""
    length, d, n = 262144, 96, 16
    inputs = {"u": torch.randn(1, length, d), "delta": torch.rand(1, length, d) * 0.1}
    inputs["A"] = -torch.arange(1.0, n + 1).repeat(d, 1)
    inputs |= {"B": torch.randn(1, length, n), "C": torch.randn(1, length, n)}
    with_grad = {key: x.clone().requires_grad_() for key, x in inputs.items()}
    scan: Any = selective_scan_channels_last

    def forward(engine: str) -> Callable[[], object]:
        def run() -> None:
            with torch.inference_mode():
                scan(**inputs, engine=engine)

        return run

    def both() -> None:
        torch.autograd.grad(scan(**with_grad, engine="numba").sum(), list(with_grad.values()))

    functions = {f"{engine} forward": forward(engine) for engine in ("numba", "chunked", "reference")}
    functions["numba forward + backward"] = both
    return interleaved("scan", functions, rounds, few=("reference forward",))


def _inference(rounds: int) -> dict:
    """Whole networks, 1 to 14 classes, one 128^3 patch."""
    size = (128, 128, 128)
    networks = {
        "SegResMamba (text)": build_network("segresmamba_text", 1, 14, size),
        "SegResMamba (text) without ToM": build_network("segresmamba_text", 1, 14, size, overrides={"use_tom": False}),
        "SegResMamba (tables)": build_network("segresmamba_tables", 1, 14, size),
        "SwinUNETR (48)": build_network("swin_unetr", 1, 14, size),
    }
    image = torch.rand(1, 1, *size)
    functions = {key: partial(inference_step, network.eval(), image) for key, network in networks.items()}
    return interleaved("inference", functions, rounds)


def _training(rounds: int) -> dict:
    """Forward and backward of the compact text variant, batch 2, 48 x 64 x 48."""
    size = (48, 64, 48)
    networks = {
        "compact": build_network("segresmamba_text", 1, 3, size, overrides=_COMPACT),
        "compact without ToM": build_network("segresmamba_text", 1, 3, size, overrides={"use_tom": False, **_COMPACT}),
    }
    image = torch.rand(2, 1, *size)
    functions = {key: partial(training_step, network, image) for key, network in networks.items()}
    functions |= {f"{key}, bf16": partial(training_step, n, image, torch.bfloat16) for key, n in networks.items()}
    return interleaved("training step", functions, 8 * rounds)


def _training_memory() -> dict:
    """A training step of the text variant at full width, 96^3, with and without ToM."""
    results = {}
    for label, overrides in (("with ToM", {}), ("without ToM", {"use_tom": False})):
        options = {"spatial_sizes": [[96, 96, 96]], "rounds": 0, "overrides": overrides}
        (found,) = run_apart("segresmamba_text", ["training"], **options)
        if "error" in found:
            raise ValueError(f"training memory, {label}: {found['error']}")
        results[label] = found
    return results


def _markdown(results: dict) -> str:
    scan, inference, training = results["scan"], results["inference"], results["training"]

    def ratio(table: dict, a: str, b: str) -> str:
        return f"{table[a]['median'] / table[b]['median']:.2f}"

    lines = [f"Measured on {describe(results['machine'])}."]
    for title, table in (
        ("Selective scan, L 262,144 x d 96 x n 16, float32", scan),
        ("Inference, one 128 x 128 x 128 patch, 1 to 14 classes, float32", inference),
        ("Training step (forward and backward), channels 16 to 128, batch 2, 48 x 64 x 48", training),
    ):
        rows = [
            [key, *(f"{row[what]:.3f}" for what in ("median", "min", "max")), str(row["runs"])]
            for key, row in table.items()
        ]
        lines += ["", f"**{title}**", "", markdown_table(["", "median s", "least", "most", "runs"], rows)]
    compared = (
        ("token loop / numba, forward", scan, "reference forward", "numba forward"),
        ("chunked / numba, forward", scan, "chunked forward", "numba forward"),
        ("SegResMamba / without ToM, inference", inference, "SegResMamba (text)", "SegResMamba (text) without ToM"),
        ("SwinUNETR(48) / SegResMamba (text), inference", inference, "SwinUNETR (48)", "SegResMamba (text)"),
        ("SwinUNETR(48) / SegResMamba (tables), inference", inference, "SwinUNETR (48)", "SegResMamba (tables)"),
        ("with / without ToM, training step", training, "compact", "compact without ToM"),
        ("with / without ToM, training step, bf16", training, "compact, bf16", "compact without ToM, bf16"),
        ("float32 / bf16, training step", training, "compact", "compact, bf16"),
    )
    rows = [[label, ratio(table, a, b)] for label, table, a, b in compared]
    lines += ["", "**Ratios of medians**", "", markdown_table(["", ""], rows)]
    lines += ["", "**Peak resident memory of one training step, text variant, 96 x 96 x 96, batch 1, float32**", ""]
    rows = [
        [label, *(f"{row[what]:,} MiB" for what in ("base_mib", "peak_mib"))]
        for label, row in results["training_memory"].items()
    ]
    lines.append(markdown_table(["", "before the network is made", "peak"], rows))
    return "\n".join(lines) + "\n"
