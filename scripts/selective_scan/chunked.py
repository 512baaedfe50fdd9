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

from .traceable import traceable_scan

__all__ = ["scan"]

_SUB = 16  # steps whose states backward holds at once


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
    Chunk-parallel scan in plain PyTorch, for any device: local scans of all chunks at once, a scan over the chunk ends,
    then the chunks again from their right states. Arguments and returns as :py:func:`.reference.scan`.

    A is constant in time, so a chunk's decay is ``exp(A * sum(delta))`` and nothing is ever divided by a decay.
    Backward keeps the chunks' first states and recomputes the others, 16 steps at a time.
    """
    dtype = u.dtype
    work = torch.promote_types(dtype, torch.float32)
    u, delta, A, B, C = (t.to(work) for t in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(work)
    if delta_softplus:
        delta = F.softplus(delta)
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # a tracer would unroll the other's loops
        y, last_state = traceable_scan(u, delta, A, B, C, index)
    else:
        y, last_state = _ChunkedScan.apply(u, delta, A, B, C, index)
    if D is not None:
        y = y + D.to(work) * u
    if z is not None:
        y = y * F.silu(z.to(work))
    return y.to(dtype), last_state


def _chunk_length(length: int) -> int:
    """About the square root of the length: the two passes over a chunk and the one over chunk ends then balance."""
    return min(256, max(_SUB, 1 << round((length.bit_length() - 1) / 2)))


class _ChunkedScan(torch.autograd.Function):
    """
    ``h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t``, ``y_t = C_t h_t`` over tokens in the order of ``index``.

    u, delta (batch, L, d), A (d, n), B, C (batch, L, g, n), index (L,) or None. States are (batch, chunks, g, d/g, n),
    and step t handles token t of every chunk; the last, shorter chunk drops out of the later steps.
    """

    @staticmethod
    def forward(ctx, u, delta, A, B, C, index):
        batch, length, d = u.shape
        groups, n = B.shape[2:]
        T = _chunk_length(length)
        chunks = -(-length // T)
        tokens = _Tokens(u, delta, A, B, C, index, T)

        ends = u.new_zeros(batch, chunks, groups, d // groups, n)
        delta_sum = u.new_zeros(batch, chunks, groups, d // groups, 1)
        for t in range(min(T, length)):
            delta_t = tokens.step(ends, t)
            delta_sum[:, : delta_t.shape[1]] += delta_t
        starts = _scan_ends(ends, torch.exp(delta_sum * tokens.A))
        h = starts.clone()
        y = torch.empty_like(u)
        for t in range(min(T, length)):
            m = tokens.step(h, t).shape[1]
            y[:, tokens.rows(t)] = (h[:, :m] * tokens.at(tokens.C, t).unsqueeze(3)).sum(-1).flatten(2)
        last_state = h[:, -1].flatten(1, 2)
        ctx.save_for_backward(u, delta, A, B, C, starts, delta_sum)
        ctx.index, ctx.chunk = index, T
        ctx.mark_non_differentiable(last_state)
        return y, last_state

    @staticmethod
    def backward(ctx, dy, _):
        u, delta, A, B, C, starts, delta_sum = ctx.saved_tensors
        T, steps = ctx.chunk, min(ctx.chunk, u.shape[1])
        tokens = _Tokens(u, delta, A, B, C, ctx.index, T)
        dy = dy.unflatten(2, starts.shape[2:4])

        # what each chunk hands to the one before it: decay_t * dh_t at its first token
        carry = torch.zeros_like(starts)
        for t in reversed(range(steps)):
            tokens.step_back(carry, dy, t)
        carry = _scan_ends(carry.flip(1), torch.exp(delta_sum * tokens.A).flip(1)).flip(1)

        saved = []  # states before each _SUB steps
        h = starts.clone()
        for t in range(steps):
            if t % _SUB == 0:
                saved.append(h.clone())
            tokens.step(h, t)

        du, ddelta, dB, dC = (torch.empty_like(x) for x in (u, delta, B, C))
        dA = torch.zeros_like(tokens.A)
        for first in reversed(range(0, steps, _SUB)):
            states = [saved.pop()]
            for t in range(first, min(first + _SUB, steps)):
                states.append(states[-1].clone())
                tokens.step(states[-1], t)
            for t in reversed(range(first, min(first + _SUB, steps))):
                rows = tokens.rows(t)
                u_t, delta_t, B_t = (tokens.at(x, t) for x in (tokens.u, tokens.delta, B))
                m = u_t.shape[1]
                h = states.pop()[:, :m]
                dh = tokens.step_back(carry, dy, t)  # and carry becomes decay * dh
                dC[:, rows] = (h * tokens.at(dy, t).unsqueeze(-1)).sum(3)
                dB[:, rows] = (dh * (delta_t * u_t).unsqueeze(-1)).sum(3)
                dhB = (dh * B_t.unsqueeze(3)).sum(-1)
                q = carry[:, :m] * states[-1][:, :m]
                du[:, rows] = (delta_t * dhB).flatten(2)
                ddelta[:, rows] = (u_t * dhB + (q * tokens.A).sum(-1)).flatten(2)
                dA += (q * delta_t.unsqueeze(-1)).sum((0, 1))
        return du, ddelta, dA.flatten(0, 1), dB, dC, None


class _Tokens:
    """The inputs of a scan, seen token t of every chunk at a time."""

    def __init__(self, u, delta, A, B, C, index, T) -> None:
        groups = B.shape[2]
        self.u, self.delta = (x.unflatten(2, (groups, -1)) for x in (u, delta))
        self.A = A.unflatten(0, (groups, -1))
        self.B, self.C, self.index, self.T = B, C, index, T

    def rows(self, t: int):
        return slice(t, None, self.T) if self.index is None else self.index[t :: self.T]

    def at(self, x: torch.Tensor, t: int) -> torch.Tensor:
        return x[:, self.rows(t)]

    def step(self, h: torch.Tensor, t: int) -> torch.Tensor:
        """Advance the states over token t in place; returns its delta (batch, chunks that have it, g, d/g, 1)."""
        delta_t = self.at(self.delta, t)
        h = h[:, : delta_t.shape[1]]
        h.mul_(torch.exp(delta_t.unsqueeze(-1) * self.A))
        h.addcmul_((delta_t * self.at(self.u, t)).unsqueeze(-1), self.at(self.B, t).unsqueeze(3))
        return delta_t.unsqueeze(-1)

    def step_back(self, carry: torch.Tensor, dy: torch.Tensor, t: int) -> torch.Tensor:
        """Advance the adjoint over token t in place; returns the gradient of its state."""
        delta_t = self.at(self.delta, t)
        carry = carry[:, : delta_t.shape[1]]
        dh = torch.addcmul(carry, self.at(dy, t).unsqueeze(-1), self.at(self.C, t).unsqueeze(3))
        torch.mul(dh, torch.exp(delta_t.unsqueeze(-1) * self.A), out=carry)
        return dh


def _scan_ends(ends: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """The state at each chunk's start, from the local states at the chunks' ends (batch, chunks, ...)."""
    starts = torch.zeros_like(ends)
    for c in range(1, ends.shape[1]):
        torch.addcmul(ends[:, c - 1], decay[:, c - 1], starts[:, c - 1], out=starts[:, c])
    return starts
