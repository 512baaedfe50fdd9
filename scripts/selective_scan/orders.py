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

from collections.abc import Sequence
from functools import lru_cache

import torch

__all__ = ["SCAN_ORDERS", "index_for", "order_index"]

# The paper's names. Any other order: the axes from slowest to fastest, a minus sign in front to walk it backwards.
SCAN_ORDERS = {"forward": "dhw", "reverse": "-dhw", "inter_slice": "hwd"}


def order_index(order: str, spatial_shape: Sequence[int], device: torch.device) -> torch.Tensor | None:
    """
    The scan order of a volume as an index over its raster sequence (forward, reverse and inter-slice of
    SegResMamba section 2.1; the axis permutations of Taming Mambas, Fig. 1b).

    Args:
        order: ``"forward"``, ``"reverse"``, ``"inter_slice"``, or a permutation of the letters d, h, w from the slowest
            axis to the fastest (``"hwd"`` is inter-slice), with a leading ``-`` to walk it backwards.
        spatial_shape: the volume's size (D, H, W) in voxels.
        device: where the index is wanted.

    Returns:
        int64 (D * H * W,): the raster position ``(d * H + h) * W + w`` that each step of the scan visits; None for the
        raster order itself.

    Raises:
        ValueError: when ``order`` is none of the above.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # what a tracer makes must not stay in the cache
        return _order_index(order, tuple(spatial_shape), device)
    return _cached_order_index(order, tuple(spatial_shape), device)


def _order_index(order: str, spatial_shape: tuple[int, ...], device: torch.device) -> torch.Tensor | None:
    axes = SCAN_ORDERS.get(order, order)
    backwards, axes = axes.startswith("-"), axes.removeprefix("-")
    if sorted(axes) != ["d", "h", "w"]:
        raise ValueError(
            f"unknown scan order {order!r}: expected one of {', '.join(SCAN_ORDERS)}, or the letters d, h and w from "
            "the slowest axis to the fastest, with a leading '-' to walk backwards."
        )
    if axes == "dhw" and not backwards:
        return None
    d, h, w = spatial_shape
    with torch.inference_mode(False):  # an index first made for inference may later be needed in training
        index = torch.arange(d * h * w, device=device).reshape(d, h, w)
        index = index.permute(*("dhw".index(axis) for axis in axes)).reshape(-1)
        return index.flip(0) if backwards else index


_cached_order_index = lru_cache(maxsize=64)(_order_index)


def order_steps(
    indices: Sequence[torch.Tensor | None], length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Several scan orders in the form that kernels read. Cached; the indices are looked up by identity.

    Args:
        indices: K indices of :py:func:`order_index`, None for the raster order.
        length: number of tokens L.
        device: where the result is wanted.

    Returns:
        int32 (K, L) each: the token at each step of an order, and the step of each token.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # as above
        return _order_steps(tuple(indices), length, device)
    return _cached_order_steps(tuple(indices), length, device)


def _order_steps(
    indices: tuple[torch.Tensor | None, ...], length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):
        plain = torch.arange(length, device=device)
        index = torch.stack([plain if i is None else i for i in indices])
        inverse = torch.empty_like(index).scatter_(1, index, plain.expand_as(index))
        return index.to(torch.int32), inverse.to(torch.int32)


_cached_order_steps = lru_cache(maxsize=16)(_order_steps)


def index_for(
    order: str | None, spatial_shape: Sequence[int] | None, length: int, device: torch.device
) -> torch.Tensor | None:
    """
    :py:func:`order_index` for a sequence, with the volume's shape checked against it.

    Args:
        order: scan order, or None for a plain sequence.
        spatial_shape: the volume's size (D, H, W) in voxels.
        length: number of tokens.
        device: where the index is wanted.

    Returns:
        int64 (length,), or None for the raster order.

    Raises:
        ValueError: when the order is unknown, or the shape missing or of another length.
    """
    if order is None:
        return None
    if spatial_shape is None:
        raise ValueError(f"scan order {order!r} needs spatial_shape, the size (D, H, W) of the volume.")
    d, h, w = spatial_shape
    if d * h * w != length:
        raise ValueError(f"spatial_shape {tuple(spatial_shape)} holds {d * h * w} voxels, the sequence {length}.")
    return order_index(order, spatial_shape, device)
