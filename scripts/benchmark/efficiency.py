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

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from tqdm import tqdm

from scripts.clear_errors import listed
from scripts.complexity import dead_parameters, flops, paper_macs, parameter_counts
from scripts.host_memory import retain_freed_memory
from scripts.output import markdown_table

from .apart import run_apart
from .energy import Energy, co2_as_in_the_paper
from .measuring import (
    describe,
    file_name,
    free_gb,
    interleaved,
    machine,
    pick_device,
    release_memory,
    write_results,
)
from .networks import build_network, first_cause, network_names
from .papers import load_papers
from .steps import DTYPES, make_step

__all__ = ["count", "counts", "efficiency"]

_RATIOS = {  # label, key of the results, key of the papers' figures
    "inference": (("time", "median", "inference"), ("memory", "memory_mib", "")),
    "training": (("time", "median", "epoch"), ("memory", "memory_mib", "memory")),
}

_ROOT = Path(__file__).parents[2]


def efficiency(
    config: str = "configs/benchmark.yaml",
    networks: str | Sequence[str] = "",
    setups: str | Sequence[str] = "",
    rounds: int | None = None,
    inference_only: bool = False,
    device: str = "",
    precision: str = "",
    country: str = "DEU",
    watts: float = 250.0,
    kg_per_kwh: float = 0.61,
    memory_gb: float = 0.0,
    output_dir: str = "docs/benchmarks",
    name: str = "",
) -> None:
    """
    What networks cost, beside the papers' figures: parameters, operations, and time, peak memory, energy and
    CO2-equivalent of inference and of a training step (forward, Dice loss, backward, Adam), of one volume unless the
    set-up has a ``batch_size``. What is compared runs in turn, round by round, in one process; the peak memory is taken
    in processes of their own.

    Args:
        config: YAML file with the set-ups, and which of them and which networks are measured where nothing is said.
        networks: names of overlays in configs/networks, with commas between them, or "all".
        setups: names of set-ups, with commas between them, or "all".
        rounds: timed runs of each after one that is not timed, at least 1; default: what the config says.
        inference_only: leave out the training step.
        device: "cpu" or "cuda"; default: "cuda" where there is one.
        precision: "fp32", "bf16" or "fp16" by autocast; default: "fp16" on CUDA, "fp32" elsewhere.
        country: ISO code of three letters, whose carbon intensity codecarbon takes.
        watts: power for the CO2-equivalent as in the paper's Table 6 (time x power x carbon intensity).
        kg_per_kwh: carbon intensity for the same.
        memory_gb: networks that need more GB of host memory are left out (Linux); default: 90 % of what is free.
        output_dir: where ``efficiency-<name>.json``, ``.csv`` and ``.md`` are written.
        name: of the machine in the files' names; default: its processor's or GPU's.

    Raises:
        ValueError: when a network, a set-up, the device or the precision is unknown.
    """
    plan = _plan(config, networks, setups)
    rounds = plan["timed"]["rounds"] if rounds is None else rounds
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}.")
    device = pick_device(device)
    precision = precision or ("fp16" if device.startswith("cuda") else "fp32")
    if precision not in DTYPES or (precision == "fp16" and device == "cpu"):
        raise ValueError(f"precision must be fp32, bf16 or, on CUDA, fp16, got {precision!r}.")
    if plan["reference"] not in plan["networks"]:
        plan["networks"] = [plan["reference"], *plan["networks"]]  # all ratios are to it
    energy = Energy(country, device)
    retain_freed_memory()  # as the configs do
    torch.manual_seed(0)
    steps = ("inference",) if inference_only else ("inference", "training")
    options = {"device": device, "precision": precision, "steps": steps}
    stem = f"efficiency-{name or file_name(str(machine(device)['name']))}"
    results: dict[str, Any] = {"machine": machine(device), "precision": precision, "reference": plan["reference"]}
    results |= {"country": country, "watts": watts, "kg_per_kwh": kg_per_kwh, "setups": {}, "rows": []}
    results["rounds"] = rounds
    for setup, shape in plan["setups"].items():
        rows = _count_rows({setup: shape}, plan["networks"])
        results["setups"][setup] = shape
        results["rows"] += rows

        def keep() -> None:
            write_results(results, _markdown(results), stem, output_dir, _csv(results["rows"]))

        _measure(shape, rows, rounds, energy, memory_gb, options, setup, keep)
        for row in rows:
            if "median" in row.get("training", {}):
                kg = co2_as_in_the_paper(row["training"]["median"], watts, kg_per_kwh)
                row["training"]["co2_as_in_the_paper_g"] = 1000 * kg
        keep()


def counts(
    config: str = "configs/benchmark.yaml",
    networks: str | Sequence[str] = "all",
    setups: str | Sequence[str] = "all",
    output_dir: str = "docs/benchmarks",
) -> None:
    """
    Parameters and operations of networks, beside the papers' figures; nothing is run.

    Args:
        config: YAML file with the set-ups.
        networks: names of overlays in configs/networks, with commas between them, or "all".
        setups: names of set-ups, with commas between them, or "all".
        output_dir: where ``counts.json``, ``.csv`` and ``.md`` are written.

    Raises:
        ValueError: when a network or a set-up is unknown.
    """
    plan = _plan(config, networks, setups)
    results = {"setups": plan["setups"], "rows": _count_rows(plan["setups"], plan["networks"])}
    write_results(results, "\n".join(_tables(results)[1:]) + "\n", "counts", output_dir, _csv(results["rows"]))


def _count_rows(setups: Mapping[str, Any], networks: Sequence[str]) -> list[dict[str, Any]]:
    papers = load_papers()
    return [
        {"setup": s, "network": n, **count(n, setups[s]), "paper": papers.get(s, {}).get(n, {})}
        for s, n in tqdm([(s, n) for s in setups for n in networks], desc="counting")
    ]


def count(network: str, setup: Mapping[str, Any]) -> dict[str, Any]:
    """
    Parameters and operations of a network; see :py:mod:`scripts.complexity`.

    Args:
        network: overlay in configs/networks, by name.
        setup: ``in_channels``, ``out_channels``, ``spatial_size``, and ``overrides`` by network.

    Returns:
        ``parameters``, ``live`` ones, those in ``tom``, ``macs`` by thop's rules and ``flops``; ``error`` where the
        network cannot be made or does not take the size, and what is known without that.
    """
    size, channels = setup["spatial_size"], setup["in_channels"]
    found: dict[str, Any] = {}
    try:
        overrides = setup.get("overrides", {}).get(network)
        made = build_network(network, channels, setup["out_channels"], size, "meta", overrides)
        parameters = parameter_counts(made)
        found |= {"parameters": parameters["all"], "tom": parameters["tom"]}
        dead = set(dead_parameters(made, channels, size))
        live = sum(p.numel() for name, p in made.named_parameters() if p.requires_grad and name not in dead)
        return found | {"live": live, "macs": paper_macs(made, channels, size), "flops": flops(made, channels, size)}
    except (RuntimeError, ValueError) as error:
        return found | {"error": f"does not take this size: {first_cause(error)}"}


def _plan(config: str, networks: str | Sequence[str], setups: str | Sequence[str]) -> dict[str, Any]:
    """The config, checked, with those set-ups and networks alone that are chosen."""
    path = Path(config)
    if not path.is_file():
        path = _ROOT / config
    if not path.is_file():
        raise ValueError(f"{config}: there is no such file.")
    plan = ConfigParser.load_config_file(path)
    for key in ("setups", "reference", "timed"):
        if key not in plan:
            raise ValueError(f"{path}: the key {key!r} is missing.")
    for name, shape in plan["setups"].items():
        for key in ("in_channels", "out_channels", "spatial_size"):
            if key not in shape:
                raise ValueError(f"{path}: the set-up {name} lacks the key {key!r}.")
        strange = set(shape.get("overrides", {})) - set(network_names())
        if strange:
            raise ValueError(f"{path}: the set-up {name} has overrides of {sorted(strange)[0]!r}, which is no network.")
    chosen = {}
    for what, given, known in (("networks", networks, network_names()), ("setups", setups, list(plan["setups"]))):
        names = listed(given)
        names = known if names == ["all"] else names or plan["timed"][what]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"unknown in {what}: {', '.join(map(str, unknown))}. There are: {', '.join(known)}.")
        chosen[what] = names
    return {**plan, **chosen, "setups": {name: plan["setups"][name] for name in chosen["setups"]}}


def _measure(
    shape: Mapping[str, Any],
    rows: Sequence[dict],
    rounds: int,
    energy: Energy,
    memory_gb: float,
    options: Mapping[str, Any],
    title: str,
    keep: Callable[[], None],
) -> None:
    """Peak memory, time and energy of the networks, put into their rows; ``keep`` is called when memory is known."""
    rows = [row for row in rows if "error" not in row]
    device, size, batch_size = options["device"], list(shape["spatial_size"]), shape.get("batch_size", 1)
    # The process that times them holds weights and Adam's states of all.
    memory_gb = memory_gb or max(2.0, free_gb() - sum(12 * row["parameters"] for row in rows) / 1e9)
    for row in tqdm(rows, desc=f"{title}, memory"):
        arguments = {"in_channels": shape["in_channels"], "out_channels": shape["out_channels"], **options}
        arguments |= {"overrides": shape.get("overrides", {}).get(row["network"]), "batch_size": batch_size}
        for found in run_apart(
            row["network"], spatial_sizes=[size], rounds=0, memory_gb=round(memory_gb, 3), **arguments
        ):
            kept = {key: found[key] for key in ("error", "base_mib", "peak_mib") if key in found}
            row[found["step"]] = kept
            if "error" not in kept:
                kept["memory_mib"] = kept["peak_mib"] - kept["base_mib"]
    keep()
    image = torch.rand(batch_size, shape["in_channels"], *size, device=device)
    functions: dict[str, Callable[[], object]] = {}
    for row in rows:
        steps = [step for step in options["steps"] if "error" not in row.get(step, {"error": ""})]
        if steps:
            own = shape.get("overrides", {}).get(row["network"])
            made = build_network(row["network"], image.shape[1], shape["out_channels"], size, overrides=own).to(device)
            dtype = DTYPES[options["precision"]]
            functions |= {
                f"{row['network']}, {step}": make_step(made, step, image, shape["out_channels"], dtype)
                for step in steps
            }
    errors: dict[str, str] = {}
    timed = interleaved(title, functions, rounds, clock=energy.clock, errors=errors)
    for row in rows:
        for step in options["steps"]:
            key = f"{row['network']}, {step}"
            if key in timed:
                row[step] |= timed[key] | energy.of(functions[key])
            elif key in errors:
                row[step]["error"] = f"failed: {errors[key]}"
    energy.forget()
    functions.clear()
    release_memory(device)


def _csv(rows: Sequence[dict]) -> str:
    """A line for each set-up and network, nested names joined by dots."""

    def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in row.items():
            found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        return found

    lines = [flat(row) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _markdown(results: Mapping[str, Any]) -> str:
    batch = "" if all("batch_size" in setup for setup in results["setups"].values()) else ", batch 1"
    where = f"{describe(results['machine'])}; {results['precision']}{batch}"
    return "\n".join([f"Measured on {where}. CO2e for {results['country']}.", *_tables(results)]) + "\n"


def _tables(results: Mapping[str, Any]) -> list[str]:
    lines = []
    for setup, shape in results["setups"].items():
        rows = [row for row in results["rows"] if row["setup"] == setup]
        size = " x ".join(map(str, shape["spatial_size"]))
        size += f", batch {shape['batch_size']}" if "batch_size" in shape else ""
        lines += ["", f"**{setup}: {shape['in_channels']} to {shape['out_channels']} channels, {size}**", ""]
        lines += _counts_table(rows)
        lines += _measured_table([row for row in rows if {"inference", "training"} & set(row)], results)
    return lines


def _counts_table(rows: Sequence[dict]) -> list[str]:
    heads = ["network", "parameters, M", "live", "the paper", "MACs by thop's rules, G", "the paper", "ours / its"]
    heads += ["FLOPs / 2, G: convolutions and products", "the paper's FLOPs", "ToM beside it", "all"]
    lines = []
    for row in rows:
        paper = row["paper"]
        macs, counted = row.get("macs"), {key: value / 2e9 for key, value in row.get("flops", {}).items()}
        cells = [row["network"], *(_number(row.get(key), 1e6) for key in ("parameters", "live"))]
        cells += [_number(paper.get("parameters")), _number(macs, 1e9) or row["error"], _number(paper.get("macs"))]
        cells += [f"{macs / 1e9 / paper['macs']:.4f}" if macs and "macs" in paper else ""]
        cells += [_number(counted.get("convolutions and products")), _number(paper.get("flops"))]
        lines.append([*cells, _number(counted.get("tom") or None), _number(counted.get("all"))])
    return [markdown_table(heads, lines)]


def _measured_table(rows: Sequence[dict], results: Mapping[str, Any]) -> list[str]:
    if not rows:
        return []
    kinds = [step for step in ("inference", "training") if any(step in row for row in rows)]
    heads, table = ["network"], []
    for step in kinds:
        heads += [f"{step}, s (least to most)", "peak, MiB", "of it before, MiB", "energy, Wh", "CO2e, g"]
        heads += ["as in Table 6, g"] if step == "training" else []
    for row in rows:
        cells = [row["network"]]
        for step in kinds:
            found = row.get(step, {})
            if "median" in found:
                cells.append(f"{found['median']:.3f} ({found['min']:.3f} to {found['max']:.3f})")
                cells += [f"{found['peak_mib']:,}", f"{found['base_mib']:,}"]
                cells += [f"{found['energy_wh']:.5f}", f"{found['co2_g']:.5f}"]
                cells += [f"{found['co2_as_in_the_paper_g']:.4f}"] if step == "training" else []
            else:
                peak = f"{found['peak_mib']:,}" if "peak_mib" in found else ""
                cells += [found.get("error", ""), peak, *[""] * (4 if step == "training" else 3)]
        table.append(cells)
    lines = ["", markdown_table(heads, table)]
    reference = next((row for row in rows if row["network"] == results["reference"]), None)
    if not any("median" in row.get(step, {}) for row in rows for step in kinds):
        return lines
    watts = [
        f"{label} {statistics.mean(row[step][key] for row in rows for step in kinds if key in row.get(step, {})):.1f} W"
        for label, key in (("processor", "cpu_w"), ("GPU", "gpu_w"), ("memory", "ram_w"))
    ]
    lines += ["", f"Mean power by codecarbon: {', '.join(watts)}."]
    if reference is None:
        return lines
    note = "the paper's own in brackets; memory is the peak less what the process held before the network was made:"
    lines += ["", f"Ratios to {results['reference']}, {note}", ""]
    wanted = [(f"{step} {what}", step, key, kept) for step in kinds for what, key, kept in _RATIOS[step]]
    table = []
    for row in rows:
        cells = [row["network"]]
        for _, step, key, kept in wanted:
            mine, other = reference.get(step, {}).get(key), row.get(step, {}).get(key)
            paper, own = reference["paper"].get(kept), row["paper"].get(kept)
            cell = f"{other / mine:.3f}" if mine and other else ""
            cells.append(cell + (f" ({own / paper:.3f})" if cell and paper and own else ""))
        table.append(cells)
    return [*lines, markdown_table(["network", *(label for label, *_ in wanted)], table)]


def _number(value: float | None, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:.2f}"
