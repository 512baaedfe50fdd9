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

"""The trained network as one file that runs without this repository, checked against the network it was made from.

Usage::

    python -m scripts.export --format pt2 --output models/model.pt2
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.transforms import ResizeWithPadOrCrop
from monai.utils import ensure_tuple

from scripts.ensemble import Ensemble
from scripts.preflight import check_keys
from scripts.segresmamba import SegResMamba
from scripts.selective_scan import ENGINE_VARIABLE
from scripts.weights import check_weights, read_weights

__all__ = ["FORMATS", "TOLERANCE", "export_bundle", "exported_program", "load", "save", "smallest_size"]

FORMATS = {"pt2": ".pt2", "onnx": ".onnx"}
"""What a network can be exported to, with the suffix of its files."""

TOLERANCE = 1e-4
"""Largest difference of a logit that a file may have from the network."""

_ONNX_OPSET = 20


def exported_program(
    network: torch.nn.Module,
    spatial_size: Sequence[int],
    in_channels: int,
    dynamic: bool = True,
) -> torch.export.ExportedProgram:
    """
    Trace a network with ``torch.export``. Only operators of PyTorch's own go into it; the scan is the ``chunked``
    engine's, whose loops are written for it.

    Args:
        network: SegResMamba, an ensemble of them, or any other where ``dynamic`` is False; on the CPU.
        spatial_size: the patch size (D, H, W), which a fixed size is.
        in_channels: channels of the input.
        dynamic: take any size from :py:func:`smallest_size`; False for ``spatial_size`` alone. The batch is any.

    Returns:
        the program; input (B, in_channels, D, H, W), output logits (B, classes, D, H, W).

    Raises:
        ValueError: when ``dynamic`` and the network is not SegResMamba.
    """
    sizes: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if dynamic:
        least = smallest_size(network)
        sizes |= {axis: torch.export.Dim(name, min=least) for axis, name in ((2, "D"), (3, "H"), (4, "W"))}
        # An example for the tracer, not run: 2 or more voxels at every level, each axis different.
        spatial_size = [2 * least + 2, 3 * least + 3, 4 * least + 4]
    volume = torch.zeros(2, in_channels, *spatial_size)
    with torch.no_grad(), _engine("chunked"):
        return torch.export.export(network.eval(), (volume,), dynamic_shapes=(sizes,), strict=False)


def smallest_size(network: torch.nn.Module) -> int:
    """
    Args:
        network: SegResMamba, or an ensemble of them.

    Returns:
        voxels of an axis from which every level provably has more than one: a single voxel takes another path in the
        network. What a tracer can prove is a little less than what holds.

    Raises:
        ValueError: when it is another network.
    """
    if isinstance(network, Ensemble):
        network = network.networks[0]
    if not isinstance(network, SegResMamba):
        raise ValueError(f"only SegResMamba exports with dynamic sizes, not {type(network).__name__}: --dynamic False.")
    return 3 * 2 ** len(network.blocks) - 1


@contextmanager
def _engine(name: str) -> Iterator[None]:
    """Another scan engine, above every setting."""
    before = os.environ.get(ENGINE_VARIABLE)
    os.environ[ENGINE_VARIABLE] = name
    try:
        yield
    finally:
        os.environ.pop(ENGINE_VARIABLE)
        if before is not None:
            os.environ[ENGINE_VARIABLE] = before


def save(program: torch.export.ExportedProgram, path: str | os.PathLike, format: str) -> None:
    """
    Args:
        program: what to write.
        path: where; its suffix must be the format's.
        format: one of ``FORMATS``.

    Raises:
        ValueError: when the format's packages are not installed.
    """
    if format == "pt2":
        torch.export.save(program, path)
    else:
        _need_onnx()
        program = program.run_decompositions({torch.ops.aten.group_norm.default: _group_norm})
        torch.onnx.export(
            program,
            (),
            str(path),
            dynamo=True,
            opset_version=_ONNX_OPSET,
            input_names=["image"],
            output_names=["pred"],
            external_data=False,
        )


def _group_norm(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> torch.Tensor:
    """
    GroupNorm by means along one axis after the other. onnxruntime's own sums up a whole group in a row in float32, and
    loses up to three digits on a patch of usual size.
    """

    def mean(values: torch.Tensor) -> torch.Tensor:
        for axis in range(values.dim() - 1, 1, -1):
            values = values.mean(axis, keepdim=True)
        return values

    grouped = x.unflatten(1, (num_groups, x.shape[1] // num_groups))
    centred = grouped - mean(grouped)
    normed = (centred * torch.rsqrt(mean(centred * centred) + eps)).flatten(1, 2)
    for parameter, apply in ((weight, torch.mul), (bias, torch.add)):
        if parameter is not None:
            normed = apply(normed, parameter.unflatten(0, (-1, *[1] * (x.dim() - 2))))
    return normed


def load(path: str | os.PathLike, format: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    Args:
        path: a file that :py:func:`save` has written.
        format: its format.

    Returns:
        what maps a volume to logits, on the CPU.

    Raises:
        ValueError: when the format's packages are not installed.
    """
    if format == "pt2":
        return torch.export.load(path).module()
    _need_onnx()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda volume: torch.from_numpy(session.run(None, {"image": volume.numpy()})[0])


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"ONNX needs a package that is not installed ({error.name}): pip install onnx onnxruntime onnxscript"
        ) from error


def _volumes(
    network: torch.nn.Module,
    parser: ConfigParser,
    patch_size: Sequence[int],
    dynamic: bool,
    real: bool,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and volume (B, C, D, H, W) of each check; the patch size first."""
    channels, shapes = int(parser["in_channels"]), [(1, *patch_size)]
    if dynamic:
        least = smallest_size(network)
        shapes += [(2, least, least + 6, least + 3), (3, least + 7, least, 2 * least)]
    else:
        shapes += [(3, *patch_size)]
    generator = torch.Generator().manual_seed(0)
    for batch, *size in shapes:
        yield "random", torch.randn(batch, channels, *size, generator=generator)
    if real:
        image = parser.get_parsed_content("dataset")[0]["image"].as_tensor()
        for _, *size in shapes:
            yield "real", torch.as_tensor(ResizeWithPadOrCrop(size)(image)).as_subclass(torch.Tensor)[None].float()


def _seconds(run: Callable[[torch.Tensor], torch.Tensor], volume: torch.Tensor, repeats: int = 3) -> float:
    """The least of several runs, which the one that the check has made has warmed up."""
    durations = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(volume)
        durations.append(time.perf_counter() - start)
    return min(durations)


def export_bundle(
    output: str,
    format: str = "pt2",
    config_file: str | Sequence[str] = "configs/inference.json",
    checkpoint: str | None = None,
    dynamic: bool = True,
    **overrides: Any,
) -> None:
    """Write the network of the configs with its weights as one file that runs without this repository.

    The file is loaded again and compared with the network on several sizes; it comes to its place only where no logit
    differs by more than 1e-4. With --input (an image, as for inference) real volumes are compared too.

    Args:
        output: the file to write.
        format: pt2 (torch.export) or onnx.
        config_file: configs and overlays, as for inference.
        checkpoint: the weights; default: the configs' own, models/model.pt.
        dynamic: any size from the smallest; False for the patch size alone.
        overrides: keys of the configs.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: expected one of {', '.join(FORMATS)}.")
    if Path(output).suffix != FORMATS[format]:
        raise ValueError(f"{output}: a file of format {format} ends in {FORMATS[format]}.")
    if format == "onnx":
        _need_onnx()
    files = list(ensure_tuple(config_file))
    given = [f"--{key}={value}" for key, value in overrides.items()]
    check_keys(["monai/bundle/__main__.py", "run", f"--config_file={files}", *given])

    parser = ConfigParser(ConfigParser.load_config_files(files))
    parser.update({**overrides, "device": "cpu"} | ({} if checkpoint is None else {"checkpoint": checkpoint}))
    network = parser.get_parsed_content("network").eval()
    weights = parser.get_parsed_content("checkpoint")
    print(check_weights(weights, network, Path(parser.get_parsed_content("bundle_root")) / "large_files.yml"))
    network.load_state_dict(read_weights(weights, "--checkpoint"))
    patch_size = parser.get_parsed_content("patch_size")
    parser["in_channels"] = parser.get_parsed_content("in_channels")

    begin = time.perf_counter()
    program = exported_program(network, patch_size, parser["in_channels"], dynamic)
    place = Path(output)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder, torch.no_grad():
        written = Path(folder) / place.name
        save(program, written, format)
        print(f"written in {time.perf_counter() - begin:.0f} s; its check:")
        run = load(written, format)
        largest = 0.0
        volumes = _volumes(network, parser, patch_size, dynamic, real="input" in overrides)
        for number, (kind, volume) in enumerate(volumes):
            logits = network(volume)
            difference = (run(volume) - logits).abs().max().item()
            print(
                f"{kind} volume {tuple(volume.shape)}: largest difference of a logit {difference:.2g}, logits "
                f"{logits.min().item():.1f} to {logits.max().item():.1f}"
            )
            largest = max(largest, float("inf") if difference != difference else difference)
            if number == 0:
                speed = _seconds(run, volume), _seconds(network, volume)
        if largest > TOLERANCE:
            raise ValueError(f"{output} is not written: a logit differs by {largest:.2g}, more than {TOLERANCE:g}.")
        size = written.stat().st_size
        os.replace(written, place)
    print(
        f"{output}: {format}, {size / 1e6:.1f} MB, patch {tuple(patch_size)} in {speed[0]:.3g} s, eager "
        f"{speed[1]:.3g} s, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    from scripts.clear_errors import command

    command(export_bundle)
