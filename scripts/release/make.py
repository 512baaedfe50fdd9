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
"""The command: gathers what a release holds, and writes it."""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
import subprocess
import zipfile
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
import yaml
from monai.utils import ensure_tuple

from scripts.output import whole_file, write_text
from scripts.release.card import front_matter, model_card
from scripts.release.configs import read_overlays, standalone_configs
from scripts.release.metadata import describe, next_version, release_metadata, sbom, scores
from scripts.weights import check_weights

__all__ = ["LIMIT", "release"]

LIMIT = 25_000_000
"""Bytes of a file; the model zoo takes none larger (25 MB)."""

_ROOT = Path(__file__).resolve().parents[2]
_PATTERNS = (
    "LICENSE",
    "large_files.yml",
    "configs/*.json",
    "configs/*.conf",
    "configs/benchmark.yaml",
    "configs/networks/*.yaml",
    "configs/options/*.yaml",
    "scripts/**/*.py",
    "docs/benchmarks/memory.json",
    "docs/benchmarks/papers.yaml",
    "docs/data_license.txt",
    "docs/engines.md",
    "docs/evaluation.md",
    "docs/exports.md",
)


def release(
    task: str | Sequence[str] = (),
    version: str | None = None,
    changelog: str | None = None,
    checkpoint: str | None = None,
    evaluation: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    name: str = "segresmamba",
    url: str | None = None,
    weights_url: str | None = None,
    output_dir: str = "dist",
) -> None:
    """
    Make a zip of the bundle for one task, as registries take it: configs that stand alone, metadata, model card and
    SBOM of that task, its weights or where they lie, scripts and licence. The same input makes the same bytes.

    In ``output_dir``: <name>_v<version>.zip; beside it its sum, <name>_v<version>.zip.sha256, and model_info.json, with
    an entry for each release there as the model zoo has them.

    Args:
        task: overlay of the task, or a list of overlays, the task's first; default: the plain configs.
        version: default: that of configs/metadata.json.
        changelog: what is new in the version, where configs/metadata.json does not say so yet.
        checkpoint: the trained weights, model.pt.
        evaluation: summary.json of an evaluation of them.
        overrides: keys of the configs that were set on the command line in training.
        name: of the bundle.
        url: where the zip will lie.
        weights_url: where the weights will lie; they are then left out of the zip and stand in large_files.yml.
        output_dir: where to write.

    Raises:
        FileNotFoundError: When a file that was given does not exist.
        FileExistsError: When there is another release of that name and version.
        ValueError: When what was given does not go together, as the message says.
    """
    if not re.fullmatch(r"[A-Za-z0-9_]+", name) or re.search(r"_v\d", name):
        raise ValueError(f"--name {name}: only letters, digits and _ are allowed, and no _v before a digit.")
    for key, address in (("url", url), ("weights_url", weights_url)):
        if address is not None and not re.match(r"https?://\S+$", address):
            raise ValueError(f"--{key} {address} is no address to download from.")
    overlays = ensure_tuple(task)
    pairs, own = read_overlays(overlays, overrides)
    configs = standalone_configs(_ROOT / "configs", pairs)
    described, network = describe(configs["inference.json"])
    summary = None if evaluation is None else _read_json(evaluation, "--evaluation")
    metadata = _read_json(str(_ROOT / "configs" / "metadata.json"), "the metadata")
    if changelog is not None:
        changelog = ", ".join(map(str, ensure_tuple(changelog)))  # fire reads "one, two" as two
    metadata = {**metadata, **next_version(metadata, version, changelog)}
    title = Path(overlays[0]).stem.replace("_", " ") if overlays else None
    found = {} if summary is None else scores(summary, described)
    shipped = _ROOT / described.checkpoint
    own_weights = not pairs and checkpoint is not None and shipped.is_file() and _hash(checkpoint) == _hash(shipped)
    if not own_weights:  # what is said there is of those
        metadata["eval_metrics"] = {}
    metadata = release_metadata(metadata, described, own, title, found)

    content = _tracked_files()
    if overlays:  # what is there is of the plain configs
        content["large_files.yml"] = _large_files([])
        content["docs/data_license.txt"] = _data_license(metadata, own, trained=checkpoint is not None)
        news = f"{metadata['name']}, of the SegResMamba bundle {metadata['version']}"
        metadata["changelog"] = {metadata["version"]: changelog or news}
    else:
        content |= _tracked_files(["configs/tasks/*.yaml"])
    sums = {}
    if checkpoint is not None:
        check_weights(checkpoint, network)
        sums = {described.checkpoint: _hash(checkpoint)}
        content |= _weights(Path(checkpoint), described.checkpoint, weights_url)
    elif weights_url is not None:
        raise ValueError("--weights_url needs --checkpoint, the file that will lie there, for its sum.")
    elif summary is not None:
        raise ValueError("--evaluation needs --checkpoint, the weights that it is of.")
    if own_weights and summary is None:  # the card that was written for them
        card = (_ROOT / "docs" / "README.md").read_text(encoding="utf-8")
        content |= _tracked_files([f"docs/{picture}" for picture in re.findall(r"\]\((pictures/[^)]+)\)", card)])
        card = _with_links_to(card, {*content, "README.md"})
    else:
        card = model_card(
            name, metadata, described, configs["train.json"], summary, next(iter(sums), None), url, weights_url
        )
    pins = _ROOT / "requirements.txt"  # not in a copy that was released itself
    requirements = pins.read_text(encoding="utf-8") if pins.is_file() else ""
    written = {f"configs/{file}": config for file, config in configs.items()}
    written |= {"configs/metadata.json": metadata, "sbom.cdx.json": sbom(name, metadata, requirements, sums)}
    content |= {file: _json(value).encode() for file, value in written.items()}
    from_above = re.sub(r"\]\((?!https?:|#)", "](docs/", card)
    content |= {"docs/README.md": card.encode(), "README.md": (front_matter() + from_above).encode()}
    for page in [path for path in content if path.startswith("docs/") and path.endswith(".md")]:
        content[page] = _with_links_to(content[page].decode(), set(content)).encode()

    file = Path(output_dir) / f"{name}_v{metadata['version']}.zip"
    info = file.with_name("model_info.json")
    entries = _read_json(str(info), "the entries of other releases") if info.exists() else {}
    _write_zip(file, name, content)
    digest = _hash(file)
    write_text(file.with_name(f"{file.name}.sha256"), f"{digest}  {file.name}\n")
    entry = {"checksum": hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()}  # the zoo compares SHA-1
    entry["source"] = url or file.name
    write_text(info, _json({**entries, file.stem: entry}))
    print(f"{file}, {file.stat().st_size / 1e6:.1f} MB, {len(content)} files, sha256 {digest}")
    if changed := _changed_files():
        print(f"It holds files as they are here, not as git has them: {', '.join(changed)}")
    if not sums:
        print("It holds no trained weights, which the model zoo asks for: --checkpoint.")


def _read_json(file: str, what: str) -> dict[str, Any]:
    if not Path(file).is_file():
        raise FileNotFoundError(f"{what}: there is no file {file}.")
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{what}: {file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{what}: {file} holds no object.")
    return content


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=4, allow_nan=False) + "\n"


def _tracked_files(patterns: Sequence[str] = _PATTERNS) -> dict[str, bytes]:
    """What the zip takes as it is, by path; of a git checkout only what git tracks, so that no stray file comes too."""
    paths = {path.relative_to(_ROOT).as_posix() for pattern in patterns for path in _ROOT.glob(pattern)}
    if (_ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=_ROOT, capture_output=True, text=True, check=False)
        if listed.returncode:
            raise OSError(f"git cannot say which files belong to the bundle: {listed.stderr.strip()}")
        paths &= set(listed.stdout.split("\0"))
    return {path: (_ROOT / path).read_bytes() for path in sorted(paths)}


def _with_links_to(page: str, held: Set[str]) -> str:
    """A page of docs/ with the links to files that are held; of others the text stays, and where they are."""

    def link(found: re.Match[str]) -> str:
        file = posixpath.normpath(f"docs/{found[2]}")
        if file == "README.md":  # of a release it is the card, which does not say what the repository's says
            return found[1]
        return found[0] if file in held else f"{found[1]} (in the project's repository)"

    return re.sub(r"\[([^\]]*)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)", link, page)


def _data_license(metadata: Mapping[str, Any], own: Mapping[str, Any], trained: bool) -> bytes:
    terms = own.get("data_license", "not stated here: ask those who hand the data out.")
    what = "Its weights were trained on" if trained else "It brings no weights; its configs are for training on"
    return (
        f"The bundle holds no data. {what}\n\n"
        f"{metadata['data_source']}\n    Licence: {terms}\n\n"
        f"Whoever passes {'the' if trained else 'such'} weights on should heed this licence. The code is under "
        "Apache-2.0, see LICENSE.\n"
    ).encode()


def _changed_files() -> list[str]:
    if not (_ROOT / ".git").exists():
        return []
    command = ["git", "diff", "--name-only", "HEAD", "--", "LICENSE", "configs", "scripts", "docs", "large_files.yml"]
    return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False).stdout.split()


def _weights(checkpoint: Path, place: str, weights_url: str | None) -> dict[str, bytes]:
    """The weights themselves and no large files, or an entry of large_files.yml."""
    if "model" in torch.load(checkpoint, map_location="cpu", weights_only=True):
        raise ValueError(f"{checkpoint} holds a training's state beside the weights: give the training's model.pt.")
    large: list[dict[str, str]] = []
    content = {}
    if weights_url is not None:
        large = [{"path": place, "url": weights_url, "hash_val": _hash(checkpoint), "hash_type": "sha256"}]
    elif checkpoint.stat().st_size > LIMIT:
        size = checkpoint.stat().st_size / 1e6
        raise ValueError(f"{checkpoint} has {size:.1f} MB, and the model zoo takes files up to 25: give --weights_url.")
    else:
        content[place] = checkpoint.read_bytes()
    return {**content, "large_files.yml": _large_files(large)}


def _large_files(entries: list[dict[str, str]]) -> bytes:
    return yaml.safe_dump({"large_files": entries}, sort_keys=False).encode()


def _hash(file: str | Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _write_zip(file: Path, top: str, content: Mapping[str, bytes]) -> None:
    """A zip whose bytes depend on nothing but what is in it."""
    with whole_file(file) as unfinished:
        with zipfile.ZipFile(unfinished, "w") as archive:
            for path in sorted(content):
                entry = zipfile.ZipInfo(f"{top}/{path}", date_time=(1980, 1, 1, 0, 0, 0))
                entry.create_system, entry.external_attr = 3, 0o100644 << 16  # a Unix file, rw-r--r--
                archive.writestr(entry, content[path], zipfile.ZIP_DEFLATED, 9)
        if file.exists() and _hash(file) != _hash(unfinished):
            raise FileExistsError(
                f"{file} holds another release: remove it, or give another --version or --output_dir."
            )
