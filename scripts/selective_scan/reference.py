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

import torch
import torch.nn.functional as F

__all__ = ["scan"]


def scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    index: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The recurrence as a loop over the tokens, the yardstick of every other engine. Arguments, shapes and meaning as in
    :py:func:`scripts.selective_scan.selective_scan_channels_last`, B and C always grouped (batch, L, g, n); ``index``
    is the raster position of each step. Computes in float32, or float64 where the inputs are.

    Returns:
        y (batch, L, d) in the dtype of ``u``, last state (batch, d, n).
    """
    dtype = u.dtype
    work = torch.promote_types(dtype, torch.float32)
    u, delta, A, B, C = (t.to(work) for t in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(work)
    if delta_softplus:
        delta = F.softplus(delta)
    B, C = (t.repeat_interleave(u.shape[2] // t.shape[2], dim=2) for t in (B, C))  # (batch, L, d, n)
    steps = range(u.shape[1]) if index is None else index.tolist()
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    y: list[torch.Tensor] = [u] * u.shape[1]
    for t in steps:
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t]
        y[t] = (h * C[:, t]).sum(-1)
    out = torch.stack(y, dim=1)
    if D is not None:
        out = out + D.to(work) * u
    if z is not None:
        out = out * F.silu(z.to(work))
    return out.to(dtype), h
