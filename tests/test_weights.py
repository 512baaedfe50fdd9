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

import hashlib

import pytest
import torch
import yaml

from scripts.ensemble import Ensemble, join_weights
from scripts.weights import check_weights, load_pretrained, shippable


@pytest.fixture
def bundle(tmp_path):
    """A bundle's folder whose large_files.yml describes models/big.pt, and a network that fits the file."""
    network = torch.nn.Conv3d(1, 2, 3)
    (tmp_path / "models").mkdir()
    torch.save(network.state_dict(), tmp_path / "models" / "big.pt")
    entry = {"path": "models/big.pt", "url": "https://example.org/big.pt", "hash_type": "sha256"}
    entry["hash_val"] = hashlib.sha256((tmp_path / "models" / "big.pt").read_bytes()).hexdigest()
    (tmp_path / "large_files.yml").write_text(yaml.safe_dump({"large_files": [entry]}))
    return tmp_path, network


def test_a_large_file_must_be_the_one_described(bundle):
    folder, network = bundle
    check_weights(folder / "models" / "big.pt", network, folder / "large_files.yml")
    torch.save(torch.nn.Conv3d(1, 2, 3).state_dict(), folder / "models" / "big.pt")
    with pytest.raises(ValueError, match="its hash differs"):
        check_weights(folder / "models" / "big.pt", network, folder / "large_files.yml")
    torch.save(network.state_dict(), folder / "models" / "own.pt")  # not described there: any that fits
    check_weights(folder / "models" / "own.pt", network, folder / "large_files.yml")


@pytest.mark.parametrize("left_out", [("hash_val", "hash_type"), ("hash_type",)])
def test_a_large_file_may_be_described_without_its_hash(bundle, left_out):
    folder, network = bundle
    (entry,) = yaml.safe_load((folder / "large_files.yml").read_text())["large_files"]
    short = {key: value for key, value in entry.items() if key not in left_out}
    (folder / "large_files.yml").write_text(yaml.safe_dump({"large_files": [short]}))
    check_weights(folder / "models" / "big.pt", network, folder / "large_files.yml")
    torch.save(torch.nn.Conv3d(1, 2, 3).state_dict(), folder / "models" / "big.pt")
    if "hash_val" in left_out:
        check_weights(folder / "models" / "big.pt", network, folder / "large_files.yml")
    else:  # MONAI's default, sha256
        with pytest.raises(ValueError, match="its hash differs"):
            check_weights(folder / "models" / "big.pt", network, folder / "large_files.yml")


def test_a_missing_large_file_says_where_it_is(bundle):
    folder, network = bundle
    (folder / "models" / "big.pt").unlink()
    with pytest.raises(FileNotFoundError, match="https://example.org/big.pt.*download_large_files"):
        check_weights(folder / "models" / "big.pt", network, folder / "large_files.yml")
    with pytest.raises(FileNotFoundError, match="train first"):
        check_weights(folder / "models" / "own.pt", network, folder / "large_files.yml")


def test_fine_tuning_from_another_width_is_warned_of(bundle, caplog):
    folder, _ = bundle

    def network(width: int, more: int = 0) -> torch.nn.Module:
        inner = [torch.nn.Conv3d(width, width, 1) for _ in range(more)]
        return torch.nn.Sequential(torch.nn.Conv3d(1, width, 3), torch.nn.Conv3d(width, 2, 3), *inner)

    torch.save(network(4).state_dict(), folder / "own.pt")
    load_pretrained(folder / "own.pt", network(4))
    assert "scratch" not in caplog.text
    load_pretrained(folder / "own.pt", network(8))
    assert "1 of 4 tensors loaded, and most of the network starts from scratch" in caplog.text
    torch.save(network(4, 20).state_dict(), folder / "own.pt")
    load_pretrained(folder / "own.pt", network(8, 20))  # 43 tensors of another shape: a few are named
    assert caplog.text.count(" and 31 more") == 2 and "20.weight" not in caplog.text


def test_weights_in_half_precision_fit(bundle):
    folder, network = bundle
    halved = {name: value.half() for name, value in network.state_dict().items()}
    torch.save(halved, folder / "models" / "half.pt")
    check_weights(folder / "models" / "half.pt", network)
    network.load_state_dict(torch.load(folder / "models" / "half.pt", weights_only=True))
    assert network.weight.dtype == torch.float32


def test_weights_to_ship(bundle, capsys):
    folder, network = bundle
    torch.save({"model": network.state_dict(), "optimizer": {"a": 1}}, folder / "last.pt")
    shippable(str(folder / "last.pt"), str(folder / "models" / "model.pt"))
    assert "2 tensors" in capsys.readouterr().out
    shipped = torch.load(folder / "models" / "model.pt", weights_only=True)
    expected = {name: value.half() for name, value in network.state_dict().items()}
    assert set(shipped) == set(expected) and all(torch.equal(shipped[name], expected[name]) for name in shipped)
    assert shipped["weight"].dtype == torch.float16
    torch.save({"weight": torch.full((2,), 1e6)}, folder / "last.pt")
    with pytest.raises(ValueError, match="too large"):
        shippable(str(folder / "last.pt"), str(folder / "models" / "model.pt"))
    assert len(torch.load(folder / "models" / "model.pt", weights_only=True)) == 2  # as it was


def test_a_pickle_of_anything_else_is_refused(bundle):
    folder, network = bundle
    torch.save(network, folder / "models" / "whole.pt")  # a pickled module, which could run any code when loaded
    with pytest.raises(ValueError, match="can be read: it is damaged, or holds other things; expected a state dict"):
        check_weights(folder / "models" / "whole.pt", network)


def test_damaged_weights_are_refused(bundle):
    """Of which torch.load says nothing, as it does not look at the archive's checksums."""
    folder, network = bundle
    file = folder / "models" / "damaged.pt"
    torch.save(network.state_dict(), file)
    content = bytearray(file.read_bytes())
    place = content.index(network.weight.detach().numpy().tobytes())
    content[place] ^= 1
    file.write_bytes(content)
    assert torch.load(file, weights_only=True).keys() == network.state_dict().keys()
    with pytest.raises(ValueError, match="damaged.pt is damaged .in .*data/0.: fetch or make it again"):
        check_weights(file, network)


def test_an_ensemble_of_another_size_is_told_by_its_number(tmp_path):
    member = torch.nn.Linear(2, 2)
    torch.save(member.state_dict(), tmp_path / "one.pt")
    join_weights([tmp_path / "one.pt"] * 2, tmp_path / "two.pt")
    with pytest.raises(ValueError, match="holds 2 networks, not 3: give --num_networks 2"):
        check_weights(tmp_path / "two.pt", Ensemble(member, 3))
    check_weights(tmp_path / "two.pt", Ensemble(member, 2))


def test_files_of_other_kinds_are_refused(bundle):
    folder, network = bundle
    file = folder / "models" / "other.pt"
    for content, message in ((b"", "it is empty"), (b"a text", "it is damaged, or holds other things")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"other.pt holds no weights that can be read: {message}"):
            check_weights(file, network)
    for other in ([torch.zeros(1)], {}, {"epoch": 3}, {"model": "segresnet"}, {"model": torch.zeros(1)}):
        torch.save(other, file)
        with pytest.raises(ValueError, match="other.pt holds no weights that can be read: expected a state dict"):
            check_weights(file, network)
    weights = network.state_dict()
    weights["bias"][1] = float("nan")
    torch.save(weights, file)
    with pytest.raises(ValueError, match="other.pt holds values in bias that are no numbers"):
        check_weights(file, network)
