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

__all__ = ["traceable_scan"]

_CHUNK = 64  # constant, so that only the number of chunks depends on the length


def traceable_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    index: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The chunked engine's scan for tracers: for ``torch.export`` its loops are PyTorch's ``scan`` operators, for
    TorchScript a scripted function, so a graph holds each loop once, for sequences of any length. Without a backward.

    Args:
        u: input (batch, L, d), float32 or float64.
        delta: step sizes (batch, L, d), positive.
        A: (d, n).
        B: (batch, L, g, n) with g dividing d.
        C: as B.
        index: raster position of each step (L,), or None.

    Returns:
        y (batch, L, d), last state (batch, d, n).
    """
    batch, length, d = u.shape
    groups, n = B.shape[2:]
    if index is not None:
        u, delta, B, C = (x[:, index] for x in (u, delta, B, C))
    # At least two chunks: a tracer would take a single one for a constant. Behind the last token the step size is 0,
    # which leaves the states as they are.
    chunks = length // _CHUNK + 2

    def steps(x: torch.Tensor) -> torch.Tensor:
        """(batch, L, g, k) to (steps of a chunk, batch, chunks, g, k)."""
        x = F.pad(x, (0, 0, 0, 0, 0, chunks * _CHUNK - length))
        return x.reshape(batch, chunks, _CHUNK, groups, x.shape[3]).movedim(2, 0).contiguous()

    u, delta = (x.reshape(batch, length, groups, d // groups) for x in (u, delta))
    A = A.reshape(groups, d // groups, n)
    delta, inputs, B, C = (steps(x) for x in (delta, delta * u, B, C))
    if torch.jit.is_tracing():
        y, last_state = torch.jit.script(_script_loops)(delta, inputs, B, C, A)
    else:
        y, last_state = _operator_loops(delta, inputs, B, C, A)
    y = y.movedim(0, 2).reshape(batch, chunks * _CHUNK, d)[:, :length]
    if index is not None:
        y = torch.zeros_like(y).index_copy(1, index, y)
    return y, last_state.flatten(1, 2)


def _operator_loops(delta, inputs, B, C, A):
    """
    The loops as operators: the function ``scan`` around them hands each loop to torch.compile before, which takes long.
    """
    loop = torch.ops.higher_order.scan
    ends, _ = loop(_end, [_no_states(delta, A)], [delta, inputs, B], (A,))
    decay = torch.exp(delta.sum(0).unsqueeze(-1) * A)
    by_chunk = [x.movedim(1, 0).contiguous() for x in (decay, ends)]
    last_state, starts = loop(_start, [torch.zeros_like(by_chunk[0][0])], by_chunk, ())
    _, y = loop(
        _output, [starts.movedim(0, 1).clone(memory_format=torch.contiguous_format)], [delta, inputs, B, C], (A,)
    )
    return y, last_state


def _no_states(delta: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(delta[0]).unsqueeze(-1).repeat(1, 1, 1, 1, A.shape[2])


def _advance(
    h: torch.Tensor, delta: torch.Tensor, inputs: torch.Tensor, B: torch.Tensor, A: torch.Tensor
) -> torch.Tensor:
    return torch.exp(delta.unsqueeze(-1) * A) * h + inputs.unsqueeze(-1) * B.unsqueeze(-2)


def _end(h, delta, inputs, B, A):
    return [_advance(h, delta, inputs, B, A), h.new_zeros(1)]


def _start(h, decay, end):
    return [decay * h + end, h.clone()]


def _output(h, delta, inputs, B, C, A):
    h = _advance(h, delta, inputs, B, A)
    return [h, (h * C.unsqueeze(-2)).sum(-1)]


def _script_loops(
    delta: torch.Tensor, inputs: torch.Tensor, B: torch.Tensor, C: torch.Tensor, A: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for TorchScript, whose tracer keeps the loops of a scripted function."""
    ends = _no_states(delta, A)
    for t in range(delta.shape[0]):
        ends = _advance(ends, delta[t], inputs[t], B[t], A)
    decay = torch.exp(delta.sum(0).unsqueeze(-1) * A)
    h = torch.zeros_like(ends[:, 0])
    starts = torch.zeros_like(ends)
    for chunk in range(ends.shape[1]):
        starts[:, chunk] = h
        h = decay[:, chunk] * h + ends[:, chunk]
    y = torch.zeros_like(delta)
    for t in range(delta.shape[0]):
        starts = _advance(starts, delta[t], inputs[t], B[t], A)
        y[t] = (starts * C[t].unsqueeze(-2)).sum(-1)
    return y, h
