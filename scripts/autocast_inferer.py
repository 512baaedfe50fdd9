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

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from monai.inferers import Inferer
from torch.overrides import TorchFunctionMode

__all__ = ["AutocastInferer", "autocast"]

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class _SmallVolumesInFloat32(TorchFunctionMode):
    """
    Convolutions of volumes that are small along an axis, in float32: oneDNN's bfloat16 weight gradient is wrong, up to
    corrupted memory, for a kernel about as large as its volume (seen with torch 2.13 and AVX512_BF16).
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.conv3d, torch.conv_transpose3d):
            volume, weight = (args[k] if len(args) > k else kwargs[name] for k, name in enumerate(("input", "weight")))
            if min(volume.shape[2:]) <= max(8, *weight.shape[2:]):
                with torch.autocast("cpu", enabled=False):
                    return func(*map(_to_float32, args), **{key: _to_float32(value) for key, value in kwargs.items()})
        return func(*args, **kwargs)


@contextmanager
def autocast(device_type: str, dtype: torch.dtype | None) -> Iterator[None]:
    """
    ``torch.autocast`` for networks that are no TorchScript: on a CPU convolutions of volumes of 8 voxels along an axis,
    or fewer, stay in float32, where oneDNN's bfloat16 gradients are wrong.

    Args:
        device_type: "cuda", "cpu" or "mps".
        dtype: torch.bfloat16 or torch.float16; None for no autocast.
    """
    with ExitStack() as stack:
        if dtype is not None:
            stack.enter_context(torch.autocast(device_type, dtype))
            if device_type == "cpu":
                stack.enter_context(_SmallVolumesInFloat32())
        yield


class AutocastInferer(Inferer):
    """
    Runs another inferer with the network in mixed precision, on any device.

    MONAI's engines know ``torch.autocast("cuda")`` alone. Here the network, and nothing else, runs under the autocast
    of the device that the input lies on; its output goes back to the wrapped inferer in float32, so that losses and
    the blending of sliding windows keep their precision. The network is given plain tensors without metadata.

    Training in fp16 needs a gradient scaler besides: set ``amp`` of MONAI's trainer.

    Args:
        inferer: the inferer to run, such as ``SimpleInferer`` or ``SlidingWindowInferer``.
        precision: "fp32", "bf16" or "fp16". fp16 needs a CUDA device.
        channels_last: whether inputs of five dimensions go to the network in ``torch.channels_last_3d`` strides; the
            network's weights should lie that way too.

    Raises:
        ValueError: When ``precision`` is none of the three, or, at the call, fp16 is asked for on another device.
    """

    def __init__(self, inferer: Inferer, precision: str = "fp32", channels_last: bool = False) -> None:
        super().__init__()
        self.inferer = inferer
        self.precision = precision
        if precision not in _DTYPES:
            raise ValueError(f"precision must be one of {', '.join(_DTYPES)}, got {precision!r}.")
        self.dtype = _DTYPES[precision]
        self.channels_last = channels_last

    def __call__(self, inputs: torch.Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """
        Args:
            inputs: volume (B, C, D, H, W), float32.
            network: callable that maps a volume to a tensor, or to tensors in a tuple, list or dict.
            args: passed on to the inferer.
            kwargs: passed on to the inferer.

        Returns:
            what the wrapped inferer makes of the network's output, floating-point tensors in float32.
        """
        if self.precision == "fp16" and inputs.device.type != "cuda":
            raise ValueError(f"precision 'fp16' needs a CUDA device, not {inputs.device.type}: use 'bf16' or 'fp32'.")

        def predict(volume: torch.Tensor, *network_args: Any, **network_kwargs: Any) -> Any:
            volume = volume.as_subclass(torch.Tensor)
            if self.channels_last and volume.ndim == 5:
                volume = volume.contiguous(memory_format=torch.channels_last_3d)
            with autocast(volume.device.type, self.dtype):
                return _to_float32(network(volume, *network_args, **network_kwargs))

        return self.inferer(inputs, predict, *args, **kwargs)


def _to_float32(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.float() if output.is_floating_point() else output
    if isinstance(output, dict):
        return {key: _to_float32(value) for key, value in output.items()}
    if isinstance(output, (tuple, list)):
        return type(output)(_to_float32(value) for value in output)
    return output
