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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.losses import DiceLoss
from tqdm import tqdm

from scripts.complexity import dead_parameters, flops, paper_macs, parameter_counts
from scripts.host_memory import retain_freed_memory

from .apart import run_apart
from .energy import Energy, co2_as_in_the_paper
from .measuring import describe, file_name, free_gb, interleaved, machine, pick_device, synchronize, write_results
from .networks import build_network, network_names
from .steps import inference_step, training_step

__all__ = ["count", "counts", "efficiency", "load_papers"]

_RATIOS = {  # label, key of the results, key of the papers' figures
    "inference": (("time", "median", "inference"), ("peak", "peak_mib", "")),
    "training": (("time", "median", "epoch"), ("peak", "peak_mib", "memory"), ("energy", "energy_wh", "co2")),
}

_ROOT = Path(__file__).parents[2]


def efficiency(
    config: str = "configs/benchmark.yaml",
    networks: str | Sequence[str] = "",
    setups: str | Sequence[str] = "",
    rounds: int = -1,
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
    CO2-equivalent of inference and of a training step, batch 1. What is compared runs in turn, round by round, in one
    process; the peak memory is taken in processes of their own.

    Args:
        config: YAML file with the set-ups, and which of them and which networks are measured where nothing is said.
        networks: names of overlays in configs/networks, with commas between them, or "all".
        setups: names of set-ups, with commas between them, or "all".
        rounds: timed runs of each after one that is not timed; default: what the config says.
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
    rounds = plan["timed"]["rounds"] if rounds < 1 else rounds
    device = pick_device(device)
    precision = precision or ("fp16" if device.startswith("cuda") else "fp32")
    if precision not in ("fp32", "bf16", "fp16"):
        raise ValueError(f"precision must be fp32, bf16 or fp16, got {precision!r}.")
    energy = Energy(country)
    retain_freed_memory()  # as the configs do
    torch.manual_seed(0)
    steps = ("inference",) if inference_only else ("inference", "training")
    options = {"device": device, "precision": precision, "steps": steps}
    stem = f"efficiency-{name or file_name(str(machine(device)['name']))}"
    results: dict[str, Any] = {"machine": machine(device), "precision": precision, "reference": plan["reference"]}
    results |= {"country": country, "watts": watts, "kg_per_kwh": kg_per_kwh, "setups": {}, "rows": []}
    for setup, shape in plan["setups"].items():
        rows = _count_rows({setup: shape}, plan["networks"])
        _measure(setup, shape, rows, rounds, energy, memory_gb or free_gb(), options)
        for row in rows:
            if "median" in row.get("training", {}):
                kg = co2_as_in_the_paper(row["training"]["median"], watts, kg_per_kwh)
                row["training"]["co2_as_in_the_paper_g"] = 1000 * kg
        results["setups"][setup] = shape
        results["rows"] += rows
        write_results(results, _markdown(results), stem, output_dir, _csv(results["rows"]))  # what is done is kept


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


def load_papers() -> dict[str, dict[str, dict[str, float]]]:
    """The papers' figures by set-up and network, from docs/benchmarks/papers.yaml."""
    return ConfigParser.load_config_file(_ROOT / "docs" / "benchmarks" / "papers.yaml")


def count(network: str, setup: Mapping[str, Any]) -> dict[str, Any]:
    """
    Parameters and operations of a network; see :py:mod:`scripts.complexity`.

    Args:
        network: overlay in configs/networks, by name.
        setup: ``in_channels``, ``out_channels``, ``spatial_size``, and ``overrides`` by network.

    Returns:
        ``parameters``, ``live`` ones, those in ``tom``, ``macs`` by thop's rules and ``flops``; ``error`` where the
        network does not take the size.
    """
    size = setup["spatial_size"]
    made = build_network(
        network, setup["in_channels"], setup["out_channels"], size, "meta", setup.get("overrides", {}).get(network)
    )
    parameters = parameter_counts(made)
    try:
        dead = set(dead_parameters(made, setup["in_channels"], size))
    except (RuntimeError, ValueError) as error:
        return {"error": f"does not take this size: {str(error).splitlines()[0]}"}
    live = sum(p.numel() for name, p in made.named_parameters() if p.requires_grad and name not in dead)
    return {
        "parameters": parameters["all"],
        "live": live,
        "tom": parameters["tom"],
        "macs": paper_macs(made, setup["in_channels"], size),
        "flops": flops(made, setup["in_channels"], size),
    }


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
    chosen = {}
    for what, given, known in (("networks", networks, network_names()), ("setups", setups, list(plan["setups"]))):
        names = given.split(",") if isinstance(given, str) else list(given)
        names = known if names == ["all"] else plan["timed"][what] if names == [""] else names
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"unknown in {what}: {', '.join(map(str, unknown))}. There are: {', '.join(known)}.")
        chosen[what] = names
    return {**plan, **chosen, "setups": {name: plan["setups"][name] for name in chosen["setups"]}}


def _measure(
    setup: str,
    shape: Mapping[str, Any],
    rows: Sequence[dict],
    rounds: int,
    energy: Energy,
    memory_gb: float,
    options: Mapping[str, Any],
) -> None:
    """Peak memory, time and energy of the networks, put into their rows."""
    channels = {"in_channels": shape["in_channels"], "out_channels": shape["out_channels"]}
    overrides = shape.get("overrides", {})
    rows = [row for row in rows if "error" not in row]
    if memory_gb:  # the process that times them holds the weights of all
        memory_gb = max(1.0, memory_gb - sum(4 * row["parameters"] for row in rows) / 1e9)
    for row in tqdm(rows, desc=f"{setup}, memory"):
        own = {"overrides": overrides.get(row["network"], {})} if overrides.get(row["network"]) else {}
        sizes = [list(shape["spatial_size"])]
        wanted = list(options["steps"])
        for found in run_apart(
            row["network"], spatial_sizes=sizes, rounds=0, memory_gb=memory_gb, **channels, **own, **options
        ):
            step = found["step"] or wanted[0]
            row[step] = {"error": found["error"]} if "error" in found else {"peak_mib": found["peak"]}
            wanted = [other for other in wanted if other != step]
    device, precision = options["device"], options["precision"]
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    image = torch.rand(1, shape["in_channels"], *shape["spatial_size"], device=device)
    label = torch.randint(0, shape["out_channels"], (1, 1, *shape["spatial_size"]), device=device)
    loss_function = DiceLoss(to_onehot_y=True, softmax=True)

    def call(network: torch.nn.Module, step: str) -> None:
        if step == "training":
            training_step(network.train(), image, dtype, label, loss_function)
        else:
            inference_step(network.eval(), image, dtype)
        synchronize(device)

    functions: dict[str, Callable[[], object]] = {}
    for row in rows:
        steps = [step for step in options["steps"] if "peak_mib" in row.get(step, {})]
        if steps:
            own = overrides.get(row["network"], {})
            network = build_network(
                row["network"], shape["in_channels"], shape["out_channels"], shape["spatial_size"], overrides=own
            ).to(device)
            functions |= {f"{row['network']}, {step}": partial(call, network, step) for step in steps}
    timed = interleaved(setup, functions, rounds, clock=energy.clock)
    for row in rows:
        for step in options["steps"]:
            key = f"{row['network']}, {step}"
            if key in timed:
                row[step] |= timed[key] | energy.of(functions[key])


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
    where = f"{describe(results['machine'])}; {results['precision']}, batch 1"
    return "\n".join([f"Measured on {where}. CO2e for {results['country']}.", *_tables(results)]) + "\n"


def _tables(results: Mapping[str, Any]) -> list[str]:
    lines = []
    for setup, shape in results["setups"].items():
        rows = [row for row in results["rows"] if row["setup"] == setup]
        size = " x ".join(map(str, shape["spatial_size"]))
        lines += ["", f"**{setup}: {shape['in_channels']} to {shape['out_channels']} channels, {size}**", ""]
        lines += _counts_table(rows)
        lines += _measured_table([row for row in rows if {"inference", "training"} & set(row)], results)
    return lines


def _counts_table(rows: Sequence[dict]) -> list[str]:
    lines = ["| network | parameters, M | live | the paper | MACs by thop's rules, G | the paper | ours / its "]
    lines[0] += "| FLOPs / 2, G: convolutions and products | the paper's FLOPs | ToM beside it |"
    lines.append("| --- " * 10 + "|")
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['network']} | {row['error']} |" + " |" * 8)
            continue
        paper, macs = row["paper"], row["macs"] / 1e9
        cells = [row["network"], f"{row['parameters'] / 1e6:.2f}", f"{row['live'] / 1e6:.2f}"]
        cells += [_number(paper.get("parameters")), f"{macs:.2f}", _number(paper.get("macs"))]
        cells += [f"{macs / paper['macs']:.4f}" if "macs" in paper else ""]
        cells += [f"{row['flops']['convolutions and products'] / 2e9:.2f}", _number(paper.get("flops"))]
        cells += [f"{row['flops']['tom'] / 2e9:.2f}" if row["flops"]["tom"] else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _measured_table(rows: Sequence[dict], results: Mapping[str, Any]) -> list[str]:
    if not rows:
        return []
    kinds = [step for step in ("inference", "training") if any(step in row for row in rows)]
    lines = ["", "| network |", "| --- |"]
    for step in kinds:
        lines[1] += f" {step}, s (least to most) | peak, MiB | energy, Wh | CO2e, g |"
        lines[1] += " as in Table 6, g |" if step == "training" else ""
        lines[2] += " --- |" * (5 if step == "training" else 4)
    for row in rows:
        cells = [row["network"]]
        for step in kinds:
            found = row.get(step, {})
            if "median" in found:
                cells.append(f"{found['median']:.3f} ({found['min']:.3f} to {found['max']:.3f})")
                cells += [f"{found['peak_mib']:,}", f"{found['energy_wh']:.5f}", f"{found['co2_g']:.5f}"]
                cells += [f"{found['co2_as_in_the_paper_g']:.4f}"] if step == "training" else []
            else:
                cells += [found.get("error", ""), *[""] * (4 if step == "training" else 3)]
        lines.append(f"| {' | '.join(cells)} |")
    reference = next((row for row in rows if row["network"] == results["reference"]), None)
    if reference is None:
        return lines
    lines += ["", f"Ratios to {results['reference']}, and the paper's own in brackets:", ""]
    wanted = [(f"{step} {what}", step, key, kept) for step in kinds for what, key, kept in _RATIOS[step]]
    lines += [f"| network | {' | '.join(label for label, *_ in wanted)} |", "| --- " * (len(wanted) + 1) + "|"]
    for row in rows:
        cells = [row["network"]]
        for _, step, key, kept in wanted:
            mine, other = reference.get(step, {}).get(key), row.get(step, {}).get(key)
            paper, own = reference["paper"].get(kept), row["paper"].get(kept)
            cell = f"{other / mine:.3f}" if mine and other else ""
            cells.append(cell + (f" ({own / paper:.3f})" if cell and paper and own else ""))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
