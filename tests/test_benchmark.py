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
import json
import re
import shutil
import subprocess
import sys
from functools import cache, partial
from types import SimpleNamespace

import pytest
import thop
import torch
from monai.bundle import ConfigParser
from PIL import Image

from scripts.benchmark.apart import apart, run_apart
from scripts.benchmark.composed import ComposedToM, _convolution
from scripts.benchmark.efficiency import count, efficiency
from scripts.benchmark.energy import co2_as_in_the_paper
from scripts.benchmark.gpu import _ratios, gpu
from scripts.benchmark.measuring import interleaved, machine
from scripts.benchmark.networks import build_network, network_names
from scripts.benchmark.page import page
from scripts.benchmark.papers import load_papers
from scripts.benchmark.plots import plots
from scripts.benchmark.scaling import exponent, scaling
from scripts.complexity import dead_parameters, flops, paper_macs, tom_macs
from scripts.segresmamba import SegResMamba
from scripts.selective_scan import selective_scan
from scripts.tri_orientated_mamba import ToM
from tests.conftest import BUNDLE_ROOT


def run(bundle_root, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "scripts.benchmark", *arguments]
    return subprocess.run(command, cwd=bundle_root, capture_output=True, text=True)


def test_a_trial_of_the_gpu_benchmark_on_the_cpu(bundle_root, tmp_path):
    options = ("--device", "cpu", "--tiny", "True", "--rounds", "1", "--output_dir", str(tmp_path), "--name", "trial")
    result = run(bundle_root, "gpu", *options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-trial.json", "gpu-trial.md"]
    results = json.loads((tmp_path / "gpu-trial.json").read_text())
    assert {row["dtype"] for row in results["scan"]} == {"float16", "bfloat16", "float32"}
    assert all(row["forward and backward"]["chunked"]["median"] > 0 for row in results["scan"])
    assert set(results["networks"][0]["networks"]) == {"SegResMamba (tables)", "SegResMamba (text)"}
    table = (tmp_path / "gpu-trial.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 3 * 2 + 3 + 1 + 2  # three heads of two lines, and what was measured


def test_what_fails_is_said_and_left_out(monkeypatch, tmp_path):
    module = sys.modules[gpu.__module__]

    class Large(torch.nn.Linear):
        def forward(self, x):
            if self.training:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
            return x

    def build(overlay: str, *args, **options) -> torch.nn.Module:
        return Large(1, 1) if overlay == "segresmamba_text" else build_network(overlay, *args, **options)

    def scan(*tensors, **options):
        raise ArithmeticError("ptxas failed.")  # as Triton's, no RuntimeError

    monkeypatch.setattr(module, "build_network", build)
    monkeypatch.setattr(module, "selective_scan_channels_last", scan)
    gpu(rounds=1, device="cpu", tiny=True, output_dir=str(tmp_path), name="trial")
    results, table = json.loads((tmp_path / "gpu-trial.json").read_text()), (tmp_path / "gpu-trial.md").read_text()
    assert all(row["errors"] == {"chunked": "ptxas failed."} for row in results["scan"]) and results["tom"]
    assert table.count("| chunked | failed: ptxas failed |") == 3
    networks = results["networks"][0]["networks"]
    assert "median" in networks["SegResMamba (text)"]["inference"]
    assert "out of memory" in networks["SegResMamba (text)"]["training"]["error"]
    assert "median" in networks["SegResMamba (tables)"]["training"]
    row = next(r for r in table.splitlines() if r.startswith("| SegResMamba (text)"))
    assert "| failed: CUDA out of memory |" in row and row.endswith(", - |")


@pytest.mark.parametrize("answer", ["", "580.1, 1980", "580.1, [N/A]", "No devices were found"])
def test_a_gpu_is_described_as_far_as_nvidia_smi_says(monkeypatch, tmp_path, answer):
    if answer:  # else there is none, as in many a container
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{answer}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    properties = SimpleNamespace(name="Some GPU", multi_processor_count=4, L2_cache_size=2**20, uuid="1a2b-3c")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = machine("cuda")
    assert found["name"] == "Some GPU" and found.get("driver") == ("580.1" if "580.1" in answer else None)
    assert found.get("largest clock, MHz") == (1980 if "1980" in answer else None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(ValueError, match="no CUDA device is here"):
        gpu(output_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_peer_of_the_fused_tom_computes_the_same():
    layer, x = ToM(8, scan_engine="chunked"), torch.randn(2, 8, 3, 4, 5)
    with torch.no_grad():  # at the start A and D are the same for all orders
        for p in layer.parameters():
            p += 0.1 * torch.randn_like(p)
    composed = ComposedToM(layer, partial(selective_scan, engine="reference"), _convolution)
    torch.testing.assert_close(composed(x), layer(x))
    with pytest.raises(ValueError, match="only the orders"):
        ComposedToM(ToM(8, residual=True), selective_scan, _convolution)


def test_the_pages_tell_what_the_gpu_benchmark_measured(bundle_root):
    results = json.loads((bundle_root / "docs/benchmarks/gpu-nvidia_h100_80gb_hbm3.json").read_text())
    row = next(r for r in results["scan"] if r["size"] == [64, 64, 64] and r["dtype"] == "bfloat16")
    scan = _ratios(row, "mamba_ssm", ("forward", "forward and backward")).split(", ")
    tom = _ratios(results["tom"][0], "mamba_ssm", ("forward", "training")).split(", ")
    page_of_engines = " ".join((bundle_root / "docs/engines.md").read_text().split())
    for ratio in scan + tom:
        assert f" {ratio} " in page_of_engines
    least = max(row[what] / results["ceilings"][what] for what in ("bytes", "exponentials"))
    assert f"gets to {100 * least / row['forward']['triton']['median']:.0f} % of" in page_of_engines
    small = [_ratios(r, "mamba_ssm", ("forward", "forward and backward")) for r in results["scan"] if r["d"] == 768]
    _, both, peaks = zip(*(map(float, ratios.split(", ")) for ratios in small))
    assert f"{min(both):.2f} to {max(both):.2f} of the time, in {min(peaks):.2f} to {max(peaks):.2f}" in page_of_engines
    readme = " ".join((bundle_root / "README.md").read_text().split())
    assert (
        f"takes {float(tom[0]):.1f} times the time forward and {float(tom[1]):.1f} times in training, in {tom[2]}"
        in readme
    )


# --- what is counted ------------------------------------------------------------------------------------------------

PLAN = ConfigParser.load_config_file(BUNDLE_ROOT / "configs" / "benchmark.yaml")
PAPERS = load_papers()
FIGURES = [(setup, network) for setup, networks in PAPERS.items() for network in networks]


@cache
def counted(network: str, setup: str) -> dict:
    return count(network, PLAN["setups"][setup])


@pytest.mark.parametrize(("network", "millions"), [("unetr", 93.01), ("swin_unetr", 62.19), ("segmamba", 67.36)])
def test_parameters_of_table_7(network, millions):
    assert PAPERS["BTCV"][network]["parameters"] == millions
    assert counted(network, "BTCV")["live"] / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize(("setup", "network"), [f for f in FIGURES if "macs" in PAPERS[f[0]][f[1]]])
def test_macs_of_tables_1_to_3(setup, network):
    """As the paper's, except its nnUNet's, which came out doubled (docs/benchmarks.md)."""
    factor = 2 if network == "dynunet" else 1
    assert factor * counted(network, setup)["macs"] / 1e9 == pytest.approx(PAPERS[setup][network]["macs"], rel=0.003)


@pytest.mark.parametrize("network", ["unetr", "unet", "swin_unetr", "dynunet"])
def test_flops_of_table_7_are_macs_and_norms(network):
    share = counted(network, "BTCV")["flops"]["convolutions and products"] / 2e9 / PAPERS["BTCV"][network]["flops"]
    assert 0.99 < share < 1


def test_flops_of_segmamba_in_table_7_hold_the_outer_projections_of_its_mamba_and_nothing_else_of_it():
    found = counted("segmamba", "BTCV")["flops"]
    projections = sum(2 * 6 * c**2 * (64 // 2**k) ** 3 for k, c in enumerate((48, 96, 192, 384))) / 1e9  # 2 ToM a level
    paper = PAPERS["BTCV"]["segmamba"]["flops"]
    assert 0.99 < (found["convolutions and products"] / 2e9 + projections) / paper < 1
    assert (found["all"] / 2e9) / paper > 1.01


def test_dead_parameters_are_found():
    class Partly(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = torch.nn.Conv3d(1, 2, 1), torch.nn.Conv3d(1, 2, 3)
            self.tom, self.unused_tom = ToM(2), ToM(2)

        def forward(self, x):
            return self.tom(self.used(x))

    network = Partly()
    dead = dead_parameters(network, 1, 4)
    assert {name.split(".")[0] for name in dead} == {"unused", "unused_tom"}
    assert len(dead) == 2 + len(list(network.unused_tom.parameters()))
    assert dead_parameters(SegResMamba(channels=(8, 16), depths=(1, 1)), 1, 16) == []


def test_thop_itself_counts_dynunet_several_times():
    """Why the paper's count of its nnUNet is no single count of DynUNet (docs/benchmarks.md)."""
    network = build_network("dynunet", 1, 14, (128, 128, 128), "meta")
    once = paper_macs(network, 1, 128)
    total = thop.profile(network, (torch.empty(1, 1, 128, 128, 128, device="meta"),), verbose=False)[0]
    assert total / once == pytest.approx(4, rel=0.01)


def test_a_network_lies_in_memory_as_it_would_in_a_training():
    for overrides, channels_last in ((None, False), ({"channels_last": True}, True)):
        network = build_network("segresnet", 1, 3, (32, 32, 32), overrides=overrides)
        weight = next(p for p in network.parameters() if p.ndim == 5 and min(p.shape) > 1)
        assert weight.is_contiguous(memory_format=torch.channels_last_3d) is channels_last


@pytest.mark.parametrize("network", network_names())
@pytest.mark.parametrize("task", ["phantom", "hippocampus"])
def test_every_network_takes_the_patch_of_every_task(network, task):
    patch = ConfigParser.load_config_file(BUNDLE_ROOT / "configs" / "tasks" / f"{task}.yaml")["patch_size"]
    assert "error" not in count(network, {"in_channels": 1, "out_channels": 3, "spatial_size": patch})


def test_a_module_that_is_registered_twice_is_counted_once():
    convolution = torch.nn.Conv3d(1, 1, 1, bias=False)
    assert paper_macs(torch.nn.Sequential(convolution), 1, 4) == 64
    assert paper_macs(torch.nn.Sequential(torch.nn.Sequential(convolution), convolution), 1, 4) == 128  # called twice


def test_flops_against_a_count_by_hand():
    network = torch.nn.Sequential(torch.nn.Conv3d(2, 3, 3, padding=1), torch.nn.ConvTranspose3d(3, 4, 2, stride=2))
    counts = flops(network, 2, (4, 6, 8))
    voxels = 4 * 6 * 8
    assert counts == {"convolutions and products": 2 * voxels * (27 * 2 * 3 + 8 * 3 * 4), "tom": 0} | {
        "all": counts["convolutions and products"]
    }
    tom = flops(ToM(8), 8, 4)
    macs = tom_macs(ToM(8), 8, 4)
    exponentials = macs.pop("exponentials")
    assert tom == {"convolutions and products": 0, "tom": 2 * sum(macs.values()) + exponentials, "all": tom["tom"]}


@pytest.mark.parametrize(("hours", "kg"), [(f["hours"], f["co2"]) for f in PAPERS["BraTS"].values()])
def test_co2_of_table_6(hours, kg):
    assert co2_as_in_the_paper(3600 * hours) == pytest.approx(kg, abs=0.01)


# --- what is measured -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two networks in two set-ups, one of which a network does not take."""
    folder = tmp_path_factory.mktemp("efficiency")
    small = {"in_channels": 2, "out_channels": 3, "spatial_size": [32, 48, 32]}
    small["overrides"] = {"segresmamba_text": {"channels": [32, 64, 128], "depths": [1, 1, 1]}}
    thin = {"in_channels": 1, "out_channels": 2, "spatial_size": [4, 32, 32], "batch_size": 3}
    thin["overrides"] = {"unet": {"network_def#network#channels": [8, 8, 8, 8, 8]}}
    plan = {
        "setups": {"Small": small, "Thin": thin},
        "reference": "segresmamba_text",
        "timed": {"setups": ["Small", "Thin"], "networks": ["unet"], "rounds": 2},
    }
    (folder / "plan.yaml").write_text(json.dumps(plan))
    efficiency(str(folder / "plan.yaml"), output_dir=str(folder), name="x", device="cpu")
    return folder


def test_efficiency(measured):
    results = json.loads((measured / "efficiency-x.json").read_text())
    rows = {(row["setup"], row["network"]): row for row in results["rows"]}
    names = [(setup, network) for setup in ("Small", "Thin") for network in ("segresmamba_text", "unet")]
    assert list(rows) == names
    assert "does not take this size: expected a volume" in rows.pop(("Thin", "segresmamba_text"))["error"]
    for row in rows.values():
        assert row["parameters"] >= row["live"] >= row["tom"] and row["flops"]["all"] > 0
        for step in ("inference", "training"):
            found = row[step]
            assert found["runs"] == 2 and 0 < found["min"] <= found["median"] <= found["max"]
            assert found["energy_wh"] > 0 and found["co2_g"] > 0
            assert found["memory_mib"] == found["peak_mib"] - found["base_mib"] > 0
        assert row["training"]["peak_mib"] > row["inference"]["peak_mib"] > 100
        expected = 1000 * co2_as_in_the_paper(row["training"]["median"])
        assert row["training"]["co2_as_in_the_paper_g"] == pytest.approx(expected)
    small, thin = rows["Small", "unet"], rows["Thin", "unet"]
    assert thin["parameters"] < small["parameters"] / 10  # the set-up's override
    states = 3 * 4 * rows["Small", "segresmamba_text"]["parameters"] / 2**20  # weights and Adam's two states
    assert rows["Small", "segresmamba_text"]["training"]["memory_mib"] > states
    with open(measured / "efficiency-x.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["setup"], line["network"]) for line in lines] == names
    assert float(lines[1]["training.median"]) == small["training"]["median"]
    table = (measured / "efficiency-x.md").read_text()
    ratio = small["inference"]["median"] / rows["Small", "segresmamba_text"]["inference"]["median"]
    assert f"| unet | {ratio:.3f} |" in table and "| segresmamba_text | 1.000 |" in table
    assert "**Thin: 1 to 2 channels, 4 x 32 x 32, batch 3**" in table


def test_batches_take_memory():
    options = {"spatial_sizes": [[64, 64, 64]], "rounds": 0}
    peaks = [next(run_apart("segresnet", ["training"], batch_size=n, **options))["peak_mib"] for n in (1, 4)]
    assert peaks[1] > peaks[0] + 3 * 64**3 * 16 * 4 * 5 / 2**20  # five volumes of 16 channels are kept at the least


@pytest.mark.parametrize(
    "message, cause", [("no memory\nleft", "no memory"), ("at 4:8:\n\n    x\n    ^\nno dtype\n", "no dtype")]
)
def test_a_function_that_fails_is_left_out(message, cause):
    calls = []

    def fails():
        calls.append("fails")
        if len(calls) > 1:
            raise RuntimeError(message)

    errors: dict[str, str] = {}
    timed = interleaved("t", {"fails": fails, "works": lambda: calls.append("works")}, 2, errors=errors)
    assert errors == {"fails": cause} and timed["works"]["runs"] == 2 and "fails" not in timed
    assert calls == ["fails", "works", "fails", "works", "works"]
    with pytest.raises(RuntimeError):
        interleaved("t", {"fails": fails}, 1)


def test_a_process_that_ends_early_is_an_error_of_what_it_did_not_measure():
    found = list(run_apart("unet", ["inference", "training"], spatial_sizes=[[16, 16, 16]], precision="fp8"))
    assert [row["step"] for row in found] == ["inference", "training"]
    assert all("KeyError" in row["error"] for row in found)


def test_figures_from_a_folder_of_results(measured, tmp_path):
    folder = tmp_path / "results"
    evaluated = BUNDLE_ROOT / "docs" / "evidence" / "confirmation" / "segresmamba-fold0-seed0.json"
    summary = json.dumps(json.loads(evaluated.read_text())["summary"])
    for network in ("unet", "segresmamba_text"):
        (folder / network).mkdir(parents=True)
        (folder / network / "summary.json").write_text(summary)
    with pytest.raises(FileNotFoundError, match="one efficiency-.*json, found 0"):
        plots(str(folder), "Small")
    shutil.copy(measured / "efficiency-x.json", folder)
    with pytest.raises(ValueError, match="there is no set-up 'Spleen'"):
        plots(str(folder), "Spleen")
    plots(str(folder), "Small", training_steps=100)
    for name in ("dice_against_memory-small-measured.png", "dice_against_co2-small-measured.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 500 and len(picture.convert("RGB").getcolors(2**24)) > 10


def test_figures_of_the_paper(tmp_path):
    plots(papers=True, setup="BraTS", output_dir=str(tmp_path))
    names = {"dice_against_memory-brats-papers.png", "dice_against_co2-brats-papers.png"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_scaling(bundle_root, tmp_path):
    options = ("--networks", "segresmamba_text", "--sizes", "4,40,24,32", "--rounds", "1", "--steps", "inference")
    result = run(bundle_root, "scaling", *options, "--output_dir", str(tmp_path), "--name", "x")
    assert result.returncode == 0, result.stderr[-2000:]
    (curve,) = json.loads((tmp_path / "scaling-x.json").read_text())["curves"]
    assert [p["side"] for p in curve["points"]] == [24, 32, 40]  # 4 is too small
    assert curve["end"].startswith("4^3 does not take this size")
    peaks = [p["peak_mib"] for p in curve["points"]]
    assert peaks == sorted(peaks) and peaks[0] > 100
    timed = [(p["side"] ** 3, p["seconds"]) for p in curve["points"]]
    assert curve["exponent"] == exponent(timed) and curve["last_exponent"] == exponent(timed[-2:])
    assert curve["memory_exponent"] >= 0
    scaling(networks="unet", sizes=(24, 32), rounds=1, steps="inference", output_dir=str(tmp_path), name="x")
    both = json.loads((tmp_path / "scaling-x.json").read_text())["curves"]
    assert both[0] == curve and [c["network"] for c in both] == ["segresmamba_text", "unet"]
    assert (tmp_path / "scaling-x.png").stat().st_size > 10000
    assert "| segresmamba_text | inference |" in (tmp_path / "scaling-x.md").read_text()


def test_exponent():
    assert exponent([(x, 3 * x**1.5) for x in (10, 20, 70)]) == pytest.approx(1.5)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_what_does_not_fit_is_said(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # each thread's stack counts
    options = {"spatial_sizes": [[16] * 3, [128] * 3], "rounds": 0, "memory_gb": 2.0}
    first, second = run_apart("segmamba", ["inference"], **options)
    assert first["peak_mib"] > 100 and second["error"] == "does not fit into memory"


def test_no_larger_size_after_one_that_took_long(capsys):
    apart("unet", [[16] * 3, [32] * 3, [48] * 3], steps=["inference"], rounds=1, seconds=1e-6)
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["seconds"] > 0 and second["spatial_size"] == [32] * 3 and second["error"].startswith("not tried")


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (efficiency, {"config": "nowhere.yaml"}, "nowhere.yaml: there is no such file."),
        (efficiency, {"networks": "unet,segresmamba"}, "unknown in networks: segresmamba. There are: dynunet,"),
        (efficiency, {"setups": ("Btcv",)}, "unknown in setups: Btcv. There are: BTCV, BraTS, Spleen, Synapse."),
        (efficiency, {"precision": "fp8"}, "precision must be fp32, bf16 or, on CUDA, fp16"),
        (efficiency, {"country": "Utopia"}, "country must be an ISO code of three letters"),
        (efficiency, {"country": "ZZZ"}, "does not know the country 'ZZZ'"),
        (scaling, {"networks": "foo"}, "unknown: foo. Networks are: dynunet,"),
        (scaling, {"steps": "train"}, "unknown: train."),
        (scaling, {"rounds": 0}, "rounds must be at least 1"),
        (efficiency, {"rounds": 0}, "rounds must be at least 1"),
        (efficiency, {"device": "mps"}, "device must be cpu or cuda"),
        (plots, {"papers": True, "setup": "foo", "output_dir": "x"}, "the papers have no set-up 'foo'"),
        (plots, {"papers": True}, "give --output_dir"),
        (build_network, {"name": "foo", "in_channels": 1, "out_channels": 2, "spatial_size": [32] * 3}, "no configs/"),
    ],
)
def test_bad_input(function, options, message):
    with pytest.raises(ValueError) as error:
        function(**options)
    assert message in str(error.value)


# --- what the documentation says --------------------------------------------------------------------------------------


def test_the_page_shows_the_tables_that_were_written(tmp_path):
    docs = tmp_path / "docs"
    shutil.copytree(BUNDLE_ROOT / "docs" / "benchmarks", docs / "benchmarks")
    shutil.copy(BUNDLE_ROOT / "docs" / "benchmarks.md", docs)
    page(str(docs / "benchmarks.md"))
    assert (docs / "benchmarks.md").read_text() == (BUNDLE_ROOT / "docs" / "benchmarks.md").read_text()


WRITTEN = json.loads((BUNDLE_ROOT / "docs" / "benchmarks" / "counts.json").read_text())["rows"]


@pytest.mark.parametrize("row", WRITTEN, ids=lambda row: f"{row['setup']}-{row['network']}")
def test_the_counts_that_were_written(row):
    own = counted(row["network"], row["setup"])
    paper = PAPERS[row["setup"]].get(row["network"], {})
    assert row == {"setup": row["setup"], "network": row["network"], **own, "paper": paper}


def test_every_network_is_counted_in_every_set_up():
    assert {(row["setup"], row["network"]) for row in WRITTEN} == {
        (s, n) for s in PLAN["setups"] for n in network_names()
    }


def test_the_figures_in_the_text_of_the_page():
    """Each number of parameters or operations in the text is one of the counts or the papers', or their difference."""
    text = re.sub(
        r"<!-- benchmarks/.*?<!-- end -->", "", (BUNDLE_ROOT / "docs" / "benchmarks.md").read_text(), flags=re.S
    )
    known = {119.98 - counted("segresmamba_tables", "BTCV")["live"] / 1e6, 13.59}  # 13.59: the test on SegMamba's FLOPs
    for row in WRITTEN:
        known |= {row[key] / 1e6 for key in ("parameters", "live") if key in row}
        known |= {row["macs"] / 1e9, *(value / 2e9 for value in row["flops"].values())}
        known |= {(row["parameters"] - row["live"]) / 1e6}
        known |= set(row["paper"].values())
    own = counted("segresmamba_tables", "BTCV")["flops"]["convolutions and products"] / 2e9
    known.add(own - PAPERS["BTCV"]["segresmamba_tables"]["flops"])
    found = re.findall(r"(\d+(?:\.\d+)?)(?= (?:M|G)\b)", text)
    assert len(found) > 10
    for number in found:
        digits = len(number.partition(".")[2])
        assert any(f"{value:.{digits}f}" == number for value in known), number


def test_segresmamba_was_measured_to_grow_in_proportion_to_the_volume():
    curves = json.loads((BUNDLE_ROOT / "docs" / "benchmarks" / "scaling-amd_epyc.json").read_text())["curves"]
    own = [curve for curve in curves if curve["network"].startswith("segresmamba")]
    assert len(own) == 4 and all(curve["points"][-1]["side"] >= 128 for curve in own)
    assert all(curve[key] <= 1.1 for curve in own for key in ("exponent", "last_exponent"))


def test_the_speed_in_the_readme_is_what_was_measured():
    measured = json.loads((BUNDLE_ROOT / "docs" / "benchmarks" / "cpu-amd_epyc.json").read_text())

    def ratio(table: str, one: str, other: str) -> float:
        return measured[table][one]["median"] / measured[table][other]["median"]

    text = " ".join((BUNDLE_ROOT / "README.md").read_text().split())
    assert f"1/{ratio('scan', 'reference forward', 'numba forward'):.0f} of the time of a loop" in text
    assert f"1/{ratio('scan', 'chunked forward', 'numba forward'):.0f} of `chunked`'s" in text
    tom = ratio("inference", "SegResMamba (text)", "SegResMamba (text) without ToM")
    assert f"{tom:.2f} times the time of the same network without its Mamba layers" in text
    swin = ratio("inference", "SwinUNETR (48)", "SegResMamba (text)")
    assert f"SwinUNETR(48) {swin:.1f} times that of SegResMamba" in text
    assert f"takes {ratio('training', 'compact', 'compact without ToM'):.2f} times that of the one without" in text
    memory = measured["training_memory"]
    peaks = [f"{memory[key]['peak_mib']:,} MiB" for key in ("with ToM", "without ToM")]
    assert f"peaks at {peaks[0]} ({peaks[1]} without" in (BUNDLE_ROOT / "docs" / "README.md").read_text()
