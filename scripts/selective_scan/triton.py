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
import torch.nn.functional as F

from .orders import order_steps
from .triton_mixer import gate_operator, mixer_operator
from .triton_scan import scan_operator

__all__ = ["MIXER_MULTIPLE", "mixer", "scan"]

MIXER_MULTIPLE = 1  # the fused mixer takes any width


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
    Scan on CUDA in Triton's kernels, parallel over chunks of tokens: the chunks' own end states, a scan over those, and
    the chunks again from the right states; softplus, bias, ``D u`` and the gate fused, states in float32. Arguments and
    returns as :py:func:`.reference.scan`.

    Where states grow (A > 0), they must not grow more than 2^127 times within 256 chunks, of at most 128 tokens each.

    Autograd keeps the inputs, and the chunks' first states: 4 * n * d / 128 bytes a token for up to 128 channels,
    twice as much for up to 256, then eight times.
    """
    D = A.new_zeros(A.shape[0], dtype=torch.float32) if D is None else D.float()
    bias = torch.zeros_like(D) if delta_bias is None else delta_bias.float()
    A, D, bias = (x.unsqueeze(0) for x in (A.float(), D, bias))
    y, starts = scan_operator(u, delta, A, B, C, D, z, bias, delta_softplus, _int32(index))
    return y, starts[:, -1].transpose(1, 2).contiguous()  # a copy, since ``starts`` holds every chunk's state


def mixer(
    tokens: torch.Tensor,
    in_proj_weight: torch.Tensor | None,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_proj_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    indices: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """
    :py:func:`scripts.selective_scan.oriented_mixer` fused for CUDA. The orders share each launch: convolution and SiLU,
    and the three passes of the scan; the projections between, and the sum, are PyTorch's. Of large volumes one order is
    taken after the other, which takes less memory.

    Autograd keeps, in bytes a token beside the parameters, with e bytes an element of x: e * (c for the tokens + 2 d
    for x and z + d for the sum) + K n d / 32 for the chunks' first states (for up to 128 channels, twice as much for up
    to 256, then eight times). The convolution, the projections and the scan are recomputed. The gate is made after the
    scan, so that its backward, which comes first, lets z and the sum go. Order by order, the gradient of x is rounded
    to its dtype after each order.
    """
    if in_proj_weight is None:
        x, z = tokens.chunk(2, dim=-1)
    else:
        if torch.is_autocast_enabled(tokens.device.type):  # once for both halves
            tokens = tokens.to(torch.get_autocast_dtype(tokens.device.type))
        x_weight, z_weight = in_proj_weight.chunk(2)
        x = F.linear(tokens, x_weight)
    index = inverse = None  # all orders are the raster's
    if any(i is not None for i in indices):
        index, inverse = order_steps(indices, x.shape[1], x.device)
    weight = conv_weight.float().transpose(1, 2).contiguous()
    # B and C before dt, and rows of a multiple of 8: so they are loaded, and multiplied, in pieces of 16 bytes.
    rank = dt_proj_weight.shape[2]
    x_proj_weight = torch.cat([x_proj_weight[:, rank:], x_proj_weight[:, :rank]], dim=1)
    more = -x_proj_weight.shape[1] % 8
    x_proj_weight = F.pad(x_proj_weight, (0, 0, 0, more))
    dt_proj_weight = F.pad(dt_proj_weight, (0, more))
    matrices = (x_proj_weight.to(x.dtype), dt_proj_weight.to(x.dtype))
    vectors = (dt_proj_bias.float(), A.float(), D.float())
    conv_bias = conv_bias.float().contiguous()
    total, _ = mixer_operator(x, weight, conv_bias, *matrices, *vectors, index, inverse)
    return gate_operator(total, z if in_proj_weight is None else F.linear(tokens, z_weight))


def _int32(index: torch.Tensor | None) -> torch.Tensor | None:
    return None if index is None else index.to(torch.int32).contiguous()
