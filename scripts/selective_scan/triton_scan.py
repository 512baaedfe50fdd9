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

"""
The ``triton`` engine's selective scan as an operator of PyTorch, and how its kernels are launched. Shapes: u, delta, z
(R, L, d), R = K * batch for K orders, A (K, d, n), B, C (R, L, g, n), D, bias (K, d), index (K, L) int32.
"""

from __future__ import annotations

import math

import torch
import triton

from . import triton_scan_kernels as kernels

__all__ = ["Scan", "chunk_states", "or_any", "scan_operator", "shape_constants"]

_LANES, _STATES = 32, 16  # of a walk over a chunk: a channel for each lane of a warp, and states it keeps at a time
_AHEAD = 4  # steps of a walk whose inputs are loaded while those before are walked
_CHANNELS, _PIECE = 16, 4  # of the scan's gradients: channels, and steps whose states are kept at a time
_REGISTERS = 168  # that a lane of scan_gradients may take, so that enough of them share a multiprocessor
_WIDEN = 2**21  # elements of u, above which B and C are taken to float32 before the forward, not at each step
_CHUNKS, _ELEMENTS = 256, 8  # at most, of a tile of the scan over chunks
_PROGRAMS = 4096  # of a warp, enough to fill a GPU
_RESIDENT = 12  # programs of scan_gradients that a multiprocessor holds with so many registers
_LOG2E = math.log2(math.e)


@torch.library.custom_op("segresmamba::scan", mutates_args=())
def scan_operator(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor | None,
    bias: torch.Tensor,
    softplus: bool,
    index: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns y (R, L, d), and the states at the chunks' starts and after the last (R, chunks + 1, n, d)."""
    with torch.cuda.device_of(u):  # Triton launches on the current device
        return Scan(u, delta, A, B, C, D, z, bias, softplus, index).forward()


@scan_operator.register_fake
def _(u, delta, A, B, C, D, z, bias, softplus, index):
    rows, length, d = u.shape
    return torch.empty_like(u, memory_format=torch.contiguous_format), chunk_states(u, rows, length, A.shape[2], d)


def chunk_states(like: torch.Tensor, rows: int, length: int, n: int, d: int) -> torch.Tensor:
    """Memory for the states at the chunks' starts, and after the last (R, chunks + 1, n, d), float32."""
    return like.new_empty((rows, -(-length // _chunk(d)) + 1, n, d), dtype=torch.float32)


@torch.library.custom_op("segresmamba::scan_backward", mutates_args=())
def _scan_backward(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor | None,
    bias: torch.Tensor,
    softplus: bool,
    index: torch.Tensor | None,
    starts: torch.Tensor,
    dy: torch.Tensor,
) -> list[torch.Tensor]:
    with torch.cuda.device_of(u):
        du, ddelta, dz, dB, dC, dA, dD = Scan(u, delta, A, B, C, D, z, bias, softplus, index).backward(starts, dy)
    dbias = ddelta.view(len(A), -1, u.shape[2]).sum(1, dtype=torch.float32)
    gradients = [du, ddelta, dA, dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dD, dbias]
    return gradients if z is None else [*gradients, dz]


@_scan_backward.register_fake
def _(u, delta, A, B, C, D, z, bias, softplus, index, starts, dy):
    inputs = (u, delta, A, B, C, D, bias) if z is None else (u, delta, A, B, C, D, bias, z)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]


def _setup_scan(ctx, inputs, output):
    *tensors, softplus, index = inputs
    ctx.save_for_backward(*tensors, index, output[1])
    ctx.softplus = softplus
    ctx.set_materialize_grads(False)


def _backward_scan(ctx, dy, _):
    *tensors, index, starts = ctx.saved_tensors
    if dy is None:
        return (None,) * 10
    gradients = _scan_backward(*tensors, ctx.softplus, index, starts, dy)
    du, ddelta, dA, dB, dC, dD, dbias = gradients[:7]
    return du, ddelta, dA, dB, dC, dD, gradients[7] if len(gradients) == 8 else None, dbias, None, None


torch.library.register_autograd("segresmamba::scan", _backward_scan, setup_context=_setup_scan)


class Scan:
    """What the forward and the backward of a scan share."""

    def __init__(self, u, delta, A, B, C, D, z, bias, softplus, index) -> None:
        self.rows, self.length, self.d = u.shape
        self.groups, self.n = B.shape[2], A.shape[2]
        self.batch = self.rows // len(A)
        self.u, self.delta = u.contiguous(), delta.contiguous()
        self.z = or_any(z, self.u).contiguous()
        self.B, self.C = (x if _columns(x) else x.contiguous() for x in (B, C))
        self.columns = [_columns(x) for x in (self.B, self.C)]
        self.A2 = (A * _LOG2E).transpose(1, 2).contiguous()
        self.D, self.bias = D.contiguous(), bias.contiguous()
        self.index = or_any(index, u)
        self.steps = _chunk(self.d)
        self.chunks = -(-self.length // self.steps)
        self.grid = (self.rows * self.chunks * self.groups * -(-(self.d // self.groups) // _LANES),)
        self.gated = z is not None
        widest = max(self.d, *(self.groups * columns for columns in self.columns))
        self.constants = {"SOFTPLUS": softplus, **shape_constants(index, self.length * widest), "T": self.steps}
        self.tile = {"n": self.n, "N": min(_STATES, triton.next_power_of_2(self.n)), "num_warps": 1}
        self.walk = {**self.tile, "W": _LANES, "P": _AHEAD}
        self.tile_of_chunks = {"T": min(_CHUNKS, triton.next_power_of_2(self.chunks)), "W": _ELEMENTS}
        self.sizes = (self.length, self.d, self.groups)

    def forward(
        self, y: torch.Tensor | None = None, starts: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns y (R, L, d) and the chunks' first states, and the last (R, chunks + 1, n, d), new or those given."""
        u, delta, bias, A2, B, C = self.u, self.delta, self.bias, self.A2, self.B, self.C
        if u.numel() > _WIDEN and self.groups * self.n <= self.d:
            B, C = (x.to(torch.float32, memory_format=torch.contiguous_format) for x in (B, C))
        b_columns, c_columns = _columns(B), _columns(C)
        starts = self._states() if starts is None else starts
        y = torch.empty_like(u) if y is None else y
        sums = self._by_chunk()
        kernels.chunk_ends[self.grid](
            u, delta, bias, A2, B, self.index, starts, sums, self.batch, *self.sizes, self.chunks,
            b_columns=b_columns, **self.constants, **self.walk,
        )  # fmt: skip
        self._scan_chunks(sums, starts, back=False)
        total = torch.empty_like(u, dtype=torch.float32) if self.n > _STATES else y
        kernels.scan_apply[self.grid](
            u, delta, bias, A2, B, C, self.D, self.z, self.index, starts, total, y, self.batch, *self.sizes,
            self.chunks, b_columns=b_columns, c_columns=c_columns, GATED=self.gated, **self.constants, **self.walk,
        )  # fmt: skip
        return y, starts

    def backward(self, starts: torch.Tensor, dy: torch.Tensor, lean: bool = False) -> tuple[torch.Tensor, ...]:
        """
        Returns du, ddelta, dz (R, L, d), dB, dC (parts, R, L, g, n), dA (K, d, n), dD (K, d).
        ``dy`` may have the rows of one order, which the orders then share. With ``lean`` and up to 16 states, du
        and ddelta take the place of u and delta.
        """
        u, delta, bias, A2, B, C = self.u, self.delta, self.bias, self.A2, self.B, self.C
        dy = dy.contiguous()
        like = {"dtype": torch.float32, "device": u.device}
        gradients, sums = self._states(), self._by_chunk()
        kernels.chunk_carries[self.grid](
            delta, bias, A2, C, self.z, self.index, dy, gradients, sums, self.batch, len(dy), *self.sizes, self.chunks,
            c_columns=self.columns[1], GATED=self.gated, **self.constants, **self.walk,
        )  # fmt: skip
        self._scan_chunks(sums, gradients, back=True)
        # More states are gone through in several turns, which each read u and delta.
        du, ddelta = (u, delta) if lean and self.n <= _STATES else (torch.empty_like(u), torch.empty_like(delta))
        dz = torch.empty_like(self.z) if self.gated else du
        # Sums over channels: as few parts, which take memory, as keep the GPU busy.
        blocks = -(-(self.d // self.groups) // _CHANNELS)
        blocks_of_part = -(-blocks // min(blocks, -(-_PROGRAMS // (self.rows * self.chunks * self.groups))))
        parts = -(-blocks // blocks_of_part)
        dB, dC = (torch.empty((parts, self.rows, self.length, self.groups, self.n), **like) for _ in range(2))
        dD = self._by_chunk()
        total = torch.empty((self.rows, 3, self.length, self.d), **like) if self.n > _STATES else u
        grid = min(self.rows * self.chunks * self.groups * parts, _RESIDENT * _multiprocessors(u.device))
        pieces = torch.empty((grid, self.steps // _PIECE, self.tile["N"], _CHANNELS), **like)
        kernels.scan_gradients[(grid,)](
            u, delta, bias, A2, B, C, self.D, self.z, self.index, starts, dy, gradients, pieces, total, du, ddelta, dz,
            dB, dC, dD, self.batch, len(dy), self.rows, *self.sizes, self.chunks, parts, blocks_of_part,
            b_columns=self.columns[0], c_columns=self.columns[1], GATED=self.gated,
            COUNT=1 if self.d // self.groups % 2 else 2, **self.constants, **self.tile, P=_PIECE, W=_CHANNELS,
            maxnreg=_REGISTERS,
        )  # fmt: skip
        dA = gradients.unflatten(0, (-1, self.batch))[:, :, 1:].sum((1, 2)).transpose(1, 2).contiguous()
        return du, ddelta, dz, dB, dC, dA, dD.unflatten(0, (-1, self.batch)).sum((1, 2))

    def _states(self) -> torch.Tensor:
        return chunk_states(self.u, self.rows, self.length, self.n, self.d)

    def _by_chunk(self) -> torch.Tensor:
        return torch.empty((self.rows, self.chunks, self.d), dtype=torch.float32, device=self.u.device)

    def _scan_chunks(self, sums: torch.Tensor, states: torch.Tensor, back: bool) -> None:
        grid = (self.rows * -(-self.n * self.d // _ELEMENTS),)
        kernels.chunk_scan[grid](
            self.A2, sums, states, self.batch, self.d, self.n, self.chunks, BACK=back, **self.tile_of_chunks
        )


def _chunk(d: int) -> int:
    """
    Steps of a chunk. A level has the fewer tokens the more channels it has, and a GPU must be filled on each; the
    length itself is not asked, so that it may be symbolic.
    """
    return 128 if d <= 128 else 64 if d <= 256 else 16


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def shape_constants(index: torch.Tensor | None, elements: int) -> dict[str, int]:
    """What a kernel is compiled for: whether there is an order, and the width of offsets in a row."""
    return {"ORDERED": index is not None, "WIDE": elements >= 2**31}


def _columns(x: torch.Tensor) -> int:
    """The elements from group to group of B or C (R, L, g, n), if tokens and rows follow without a gap, else 0."""
    if x.is_contiguous():
        return x.shape[3]
    _, length, groups, n = x.shape
    step = x.stride(1) // groups
    regular = (length * groups * step, groups * step, step, 1)
    return step if all(size == 1 or a == b for size, a, b in zip(x.shape, x.stride(), regular)) else 0


def or_any(x: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A kernel takes a pointer for each argument, also for one that it does not look at."""
    return other if x is None else x
