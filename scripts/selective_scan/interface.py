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

import torch

from .engines import resolve_engine
from .orders import index_for

__all__ = ["selective_scan", "selective_scan_channels_last"]


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    engine: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """
    Selective scan of Mamba (arXiv:2312.00752, section 3.2) with the arguments, shapes and meaning of ``mamba-ssm``'s
    ``selective_scan_fn``: ``h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t``, ``y_t = C_t h_t + D u_t``, times
    SiLU(z). States are float32 (float64 where the inputs are).

    Args:
        u: input (batch, d, L); float16, bfloat16, float32 or float64.
        delta: step sizes (batch, d, L).
        A: real state matrix (d, n).
        B: (batch, n, L), grouped (batch, g, n, L) with g dividing d, or constant (d, n).
        C: as B.
        D: skip (d,), or None.
        z: gate (batch, d, L), or None.
        delta_bias: (d,) added to delta, or None.
        delta_softplus: softplus of delta, after the bias.
        return_last_state: also return the last state, which carries no gradient.
        engine: ``"auto"`` or one of ``ENGINES``, see :py:func:`available_engines`. The environment variable
            ``SEGRESMAMBA_SCAN``, where set, stands above it.

    Returns:
        y (batch, d, L) in the dtype of ``u``; with ``return_last_state`` also the state (batch, d, n).

    Raises:
        ValueError: when shapes do not fit, A is complex or no engine has that name.
        RuntimeError: when the engine is not available here.
    """
    if u.ndim != 3:
        raise ValueError(f"u must be (batch, d, L), got shape {tuple(u.shape)}.")

    def grouped(x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 2:  # constant, one "group" a channel
            return x.expand(u.shape[0], u.shape[2], *x.shape)
        return x.movedim(-1, 1)

    y, last_state = _scan(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        grouped(B),
        grouped(C),
        D,
        None if z is None else z.transpose(1, 2),
        delta_bias,
        delta_softplus,
        None,
        None,
        engine,
    )
    return (y.transpose(1, 2), last_state) if return_last_state else y.transpose(1, 2)


def selective_scan_channels_last(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    order: str | None = None,
    spatial_shape: Sequence[int] | None = None,
    engine: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """
    :py:func:`selective_scan` over tokens whose channels are contiguous, in a scan order of a volume. Inputs and output
    stay in raster order: the order is an index, nothing is permuted or flipped.

    Args:
        u: input (batch, L, d).
        delta: step sizes (batch, L, d).
        A: state matrix (d, n).
        B: (batch, L, n) or grouped (batch, L, g, n).
        C: as B.
        D: skip (d,), or None.
        z: gate (batch, L, d), or None.
        delta_bias: (d,), or None.
        delta_softplus: softplus of delta, after the bias.
        return_last_state: also return the state after the order's last token.
        order: scan order, see :py:func:`order_index`; None for a plain sequence.
        spatial_shape: the volume's (D, H, W) with ``D * H * W = L``; needed with ``order``.
        engine: as in :py:func:`selective_scan`.

    Returns:
        y (batch, L, d) in the dtype of ``u``; with ``return_last_state`` also the state (batch, d, n).

    Raises:
        ValueError: when shapes do not fit, A is complex, or the order or engine is unknown.
        RuntimeError: when the engine is not available here.
    """
    y, last_state = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, order, spatial_shape, engine)
    return (y, last_state) if return_last_state else y


def _scan(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, order, spatial_shape, engine
) -> tuple[torch.Tensor, torch.Tensor]:
    if B.ndim == 3:
        B = B.unsqueeze(2)
    if C.ndim == 3:
        C = C.unsqueeze(2)
    _check(u, delta, A, B, C, D, z, delta_bias)
    if B.shape[2] != C.shape[2]:  # the engines know one grouping
        B, C = (x.repeat_interleave(u.shape[2] // x.shape[2], dim=2) for x in (B, C))
    index = index_for(order, spatial_shape, u.shape[1], u.device)
    module = resolve_engine(engine, u.device, torch.promote_types(u.dtype, A.dtype))
    y, last_state = module.scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, index)
    return y, last_state.detach()


def _check(u, delta, A, B, C, D, z, delta_bias) -> None:
    """One clear error for shapes that do not fit, in the channels-last form."""
    if u.ndim != 3 or A.ndim != 2 or not (u.is_floating_point() and A.is_floating_point()):
        raise ValueError(
            f"u must have 3 axes, A 2, and both real floating-point values: got shapes {tuple(u.shape)} and "
            f"{tuple(A.shape)}, {u.dtype} and {A.dtype}."
        )
    batch, length, d = u.shape
    n = A.shape[1]
    if 0 in (batch, length, d, n):
        raise ValueError(f"nothing to scan: batch {batch}, length {length}, d {d}, n {n}; none may be 0, nor empty.")
    for name, x, shape in (
        ("delta", delta, (batch, length, d)),
        ("A", A, (d, n)),
        ("D", D, (d,)),
        ("z", z, (batch, length, d)),
        ("delta_bias", delta_bias, (d,)),
    ):
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} must have shape {shape} (channels last) beside u, got {tuple(x.shape)}.")
    for name, x in (("B", B), ("C", C)):
        if x.ndim != 4 or tuple(x.shape[:2]) != (batch, length) or x.shape[3] != n or d % x.shape[2]:
            raise ValueError(
                f"{name} must be (batch {batch}, L {length}, groups dividing d {d}, n {n}) in channels-last form, "
                f"got {tuple(x.shape)}."
            )
