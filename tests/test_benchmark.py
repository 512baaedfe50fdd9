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
import shutil
import subprocess
import sys
from functools import cache

import pytest
import torch
from monai.bundle import ConfigParser
from PIL import Image

from scripts.benchmark.efficiency import count, efficiency, load_papers
from scripts.benchmark.energy import co2_as_in_the_paper
from scripts.benchmark.networks import build_network
from scripts.benchmark.page import page
from scripts.benchmark.plots import plots
from scripts.benchmark.scaling import exponent, scaling
from scripts.complexity import dead_parameters, flops, paper_macs, tom_macs
from scripts.segresmamba import SegResMamba
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_it_says_so(bundle_root, tmp_path):
    result = run(bundle_root, "gpu", "--output_dir", str(tmp_path))
    assert result.returncode != 0 and "no CUDA device" in result.stderr
    assert not list(tmp_path.iterdir())


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
def measured(bundle_root, tmp_path_factory):
    """Two networks and one that does not take the size, measured as a user would."""
    folder = tmp_path_factory.mktemp("efficiency")
    plan = {
        "setups": {"Small": {"in_channels": 2, "out_channels": 3, "spatial_size": [32, 48, 32]}},
        "reference": "segresmamba_text",
        "timed": {"setups": ["Small"], "networks": ["segresmamba_text", "unet", "swin_unetr"], "rounds": 2},
    }
    (folder / "plan.yaml").write_text(json.dumps(plan))
    result = run(
        bundle_root, "efficiency", "--config", str(folder / "plan.yaml"), "--output_dir", str(folder), "--name=x"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def test_efficiency(measured):
    results = json.loads((measured / "efficiency-x.json").read_text())
    rows = {row["network"]: row for row in results["rows"]}
    assert set(rows) == {"segresmamba_text", "unet", "swin_unetr"}
    assert "must be divisible" in rows.pop("swin_unetr")["error"]
    for row in rows.values():
        assert row["parameters"] >= row["live"] > row["tom"] and row["flops"]["all"] > 0
        for step in ("inference", "training"):
            found = row[step]
            assert found["runs"] == 2 and 0 < found["min"] <= found["median"] <= found["max"]
            assert found["energy_wh"] > 0 and found["co2_g"] > 0
        assert row["training"]["peak_mib"] > row["inference"]["peak_mib"] > 100
        expected = 1000 * co2_as_in_the_paper(row["training"]["median"])
        assert row["training"]["co2_as_in_the_paper_g"] == pytest.approx(expected)
    with open(measured / "efficiency-x.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["network"] for line in lines] == ["segresmamba_text", "unet", "swin_unetr"]
    assert float(lines[1]["training.median"]) == rows["unet"]["training"]["median"]
    table = (measured / "efficiency-x.md").read_text()
    ratio = rows["unet"]["inference"]["median"] / rows["segresmamba_text"]["inference"]["median"]
    assert f"| unet | {ratio:.3f} |" in table and "| segresmamba_text | 1.000 |" in table


def test_figures_from_a_folder_of_results(bundle_root, measured, trained, tmp_path):
    folder = tmp_path / "results"
    for network in ("unet", "segresmamba_text"):
        (folder / network).mkdir(parents=True)
        shutil.copy(trained.folder / "evaluate" / "summary.json", folder / network)
    with pytest.raises(FileNotFoundError, match="one efficiency-.*json, found 0"):
        plots(str(folder), "Small")
    shutil.copy(measured / "efficiency-x.json", folder)
    with pytest.raises(ValueError, match="there is no set-up 'Spleen'"):
        plots(str(folder), "Spleen")
    result = run(bundle_root, "plots", str(folder), "--setup", "Small", "--training_steps", "100")
    assert result.returncode == 0, result.stderr[-2000:]
    for name in ("dice_against_memory.png", "dice_against_co2.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 500 and len(picture.convert("RGB").getcolors(2**24)) > 10


def test_figures_of_the_paper(tmp_path):
    plots(papers=True, setup="BraTS", output_dir=str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"dice_against_memory.png", "dice_against_co2.png"}


def test_scaling(bundle_root, tmp_path):
    options = ("--networks", "unet", "--sizes", "40,32,64,48", "--rounds", "1", "--steps", "inference")
    result = run(bundle_root, "scaling", *options, "--output_dir", str(tmp_path), "--name", "x")
    assert result.returncode == 0, result.stderr[-2000:]
    (curve,) = json.loads((tmp_path / "scaling-x.json").read_text())["curves"]
    assert [p["side"] for p in curve["points"]] == [32, 48, 64]  # 40 is no multiple of 16
    peaks = [p["peak"] for p in curve["points"]]
    assert peaks == sorted(peaks) and peaks[0] > 100 and curve["exponent"] > 0
    assert (tmp_path / "scaling-x.png").stat().st_size > 10000
    assert "| unet | inference |" in (tmp_path / "scaling-x.md").read_text()


def test_exponent():
    assert exponent([(x, 3 * x**1.5) for x in (10, 20, 70)]) == pytest.approx(1.5)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_what_does_not_fit_is_said(bundle_root):
    sizes = "[[16, 16, 16], [128, 128, 128]]"
    options = ("--spatial_sizes", sizes, "--steps", "['inference']", "--rounds", "0", "--memory_gb", "2")
    result = run(bundle_root, "apart", "segmamba", *options)
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert first["peak"] > 100 and second["error"] == "does not fit into memory"


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (efficiency, {"networks": "unet,segresmamba"}, "unknown in networks: segresmamba. There are: dynunet,"),
        (efficiency, {"setups": ("Btcv",)}, "unknown in setups: Btcv. There are: BTCV, BraTS, Spleen, Synapse."),
        (efficiency, {"precision": "fp8"}, "precision must be fp32, bf16 or fp16, got 'fp8'"),
        (efficiency, {"country": "Utopia"}, "country must be an ISO code of three letters"),
        (efficiency, {"country": "XXX"}, "does not know the country 'XXX'"),
        (scaling, {"networks": "foo"}, "unknown: foo. Networks are: dynunet,"),
        (scaling, {"steps": "train"}, "unknown: train."),
        (plots, {"papers": True, "setup": "foo", "output_dir": "x"}, "the papers have no set-up 'foo'"),
        (plots, {"papers": True}, "give --output_dir"),
        (build_network, {"name": "foo", "in_channels": 1, "out_channels": 2, "spatial_size": [32] * 3}, "no configs/"),
    ],
)
def test_bad_input(function, options, message):
    with pytest.raises(ValueError) as error:
        function(**options)
    assert message in str(error.value)


def test_bad_input_is_one_clear_error(bundle_root):
    result = run(bundle_root, "efficiency", "--config", "nowhere.yaml")
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert result.stderr.strip().endswith("Error: nowhere.yaml: there is no such file.")


# --- what the documentation says --------------------------------------------------------------------------------------


def test_the_page_shows_the_tables_that_were_written(tmp_path):
    docs = tmp_path / "docs"
    shutil.copytree(BUNDLE_ROOT / "docs" / "benchmarks", docs / "benchmarks")
    shutil.copy(BUNDLE_ROOT / "docs" / "benchmarks.md", docs)
    page(str(docs / "benchmarks.md"))
    assert (docs / "benchmarks.md").read_text() == (BUNDLE_ROOT / "docs" / "benchmarks.md").read_text()


@pytest.mark.parametrize(("setup", "network"), [f for f in FIGURES if f[0] == "BTCV"])
def test_the_counts_that_were_written(setup, network):
    written = json.loads((BUNDLE_ROOT / "docs" / "benchmarks" / "counts.json").read_text())["rows"]
    (row,) = (row for row in written if (row["setup"], row["network"]) == (setup, network))
    assert row == {"setup": setup, "network": network, **counted(network, setup), "paper": PAPERS[setup][network]}
