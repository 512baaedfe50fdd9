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

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton

from . import triton_mixer_kernels as mixer_kernels
from . import triton_scan_kernels as scan_kernels
from .orders import order_steps

__all__ = ["MIXER_MULTIPLE", "mixer", "scan"]

MIXER_MULTIPLE = 1  # the fused mixer takes any width

_STEPS, _WIDTH = 128, 32  # of a tile of the convolution
_LANES, _STATES = 32, 16  # of a walk over a chunk: a channel for each lane of a warp, and states it keeps at a time
_AHEAD = 4  # steps whose inputs chunk_ends and chunk_carries load at a time in raster order
_CHANNELS, _PIECE = 16, 4  # of the scan's gradients: channels, and steps whose states are kept at a time
_REGISTERS = 168  # that a lane of scan_gradients may take, so that enough of them share a multiprocessor
_CHUNKS, _ELEMENTS = 256, 8  # at most, of a tile of the scan over chunks
_TOGETHER = 2**22  # elements of an order, up to which the backward takes all orders at once
_PROGRAMS = 4096  # of a warp, enough to fill a GPU
_GATE = 1024  # elements of a program of the gate
_TILE = {"T": _STEPS, "W": _WIDTH}
_LOG2E = math.log2(math.e)


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
    y, starts = _scan(u, delta, A, B, C, D, z, bias, delta_softplus, _int32(index))
    return y, starts[:, -1].transpose(1, 2).contiguous()  # a copy, since ``starts`` holds every chunk's state


def mixer(
    xz: torch.Tensor,
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
    the three passes of the scan, the sum and the gate; the projections between are PyTorch's.

    Autograd keeps, in bytes a token beside the parameters, with e bytes an element of ``xz``: e * (2 d for xz + d for
    the sum + K (2 n + dt_rank, rounded up to a multiple of 8) for B, C and dt) + K n d / 32 for the chunks' first
    states (for up to 128 channels, twice as much for up to 256, then eight times). The convolution, dt_proj and the
    scan are recomputed; of large volumes one order after the other, which takes less memory.
    """
    index = inverse = None  # all orders are the raster's
    if any(i is not None for i in indices):
        index, inverse = order_steps(indices, xz.shape[1], xz.device)
    weight = conv_weight.float().transpose(1, 2).contiguous()
    # B and C before dt, and rows of a multiple of 8: so they are loaded, and multiplied, in pieces of 16 bytes.
    rank = dt_proj_weight.shape[2]
    x_proj_weight = torch.cat([x_proj_weight[:, rank:], x_proj_weight[:, :rank]], dim=1)
    more = -x_proj_weight.shape[1] % 8
    x_proj_weight = F.pad(x_proj_weight, (0, 0, 0, more))
    dt_proj_weight = F.pad(dt_proj_weight, (0, more))
    matrices = (x_proj_weight.to(xz.dtype), dt_proj_weight.to(xz.dtype))
    vectors = (dt_proj_bias.float(), A.float(), D.float())
    return _mixer(xz.contiguous(), weight, conv_bias.float().contiguous(), *matrices, *vectors, index, inverse)[0]


def _int32(index: torch.Tensor | None) -> torch.Tensor | None:
    return None if index is None else index.to(torch.int32).contiguous()


# Custom operators, so that torch.compile and torch.export see one node each. Shapes: u, delta, z (R, L, d), R = K *
# batch, A (K, d, n), B, C (R, L, g, n), D, bias (K, d), index (K, L) int32.


@torch.library.custom_op("segresmamba::scan", mutates_args=())
def _scan(
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
    with torch.cuda.device_of(u):  # Triton launches on the current device
        return _Scan(u, delta, A, B, C, D, z, bias, softplus, index).forward()


@_scan.register_fake
def _(u, delta, A, B, C, D, z, bias, softplus, index):
    rows, length, d = u.shape
    return torch.empty_like(u, memory_format=torch.contiguous_format), _starts(u, rows, length, A.shape[2], d)


def _starts(like: torch.Tensor, rows: int, length: int, n: int, d: int) -> torch.Tensor:
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
        du, ddelta, dz, dB, dC, dA, dD = _Scan(u, delta, A, B, C, D, z, bias, softplus, index).backward(starts, dy)
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


@torch.library.custom_op("segresmamba::mixer", mutates_args=())
def _mixer(
    xz: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    x_proj: torch.Tensor,
    dt_proj: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    index: torch.Tensor | None,
    inverse: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, length, d = xz.shape[0], xz.shape[1], conv_bias.shape[1]
    with torch.cuda.device_of(xz), torch.autocast(xz.device.type, enabled=False):
        u = _convolve(xz, conv_weight, conv_bias, index)
        packed = u.view(len(u), -1, d) @ x_proj.transpose(1, 2)
        y, starts = _mixer_scan(u, packed, dt_proj, dt_bias, A, D, index).forward()
        out, total = xz.new_empty(batch, length, d), xz.new_empty(batch, length, d)
        mixer_kernels.gate_forward[(-(-out.numel() // _GATE),)](xz, y, out, total, out.numel(), len(u), d, W=_GATE)
    return out, packed, starts, total


@_mixer.register_fake
def _(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, index, inverse):
    (batch, length, _), (K, d, n) = xz.shape, A.shape
    out = xz.new_empty(batch, length, d)
    packed = xz.new_empty(K, batch * length, x_proj.shape[1])
    return out, packed, _starts(xz, K * batch, length, n, d), torch.empty_like(out)


@torch.library.custom_op("segresmamba::mixer_backward", mutates_args=())
def _mixer_backward(
    xz: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    x_proj: torch.Tensor,
    dt_proj: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    index: torch.Tensor | None,
    inverse: torch.Tensor | None,
    packed: torch.Tensor,
    starts: torch.Tensor,
    total: torch.Tensor,
    dout: torch.Tensor,
) -> list[torch.Tensor]:
    (batch, length, _), (K, taps, d) = xz.shape, conv_weight.shape
    with torch.cuda.device_of(xz), torch.autocast(xz.device.type, enabled=False):
        dxz, dy = torch.empty_like(xz), torch.empty_like(total)
        mixer_kernels.gate_backward[(-(-dy.numel() // _GATE),)](
            xz, total, dout.contiguous(), dy, dxz, dy.numel(), d, W=_GATE
        )

        du = xz.new_empty(K, batch, length, d)
        parts = [slice(k, k + 1) for k in range(K)] if du[0].numel() > _TOGETHER else [slice(0, K)]
        gradients = []
        by_order = [conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, index, packed]
        by_order += [starts.unflatten(0, (K, batch)), du]
        for part in parts:
            gradients.append(_mixer_gradients(xz, dy, *(None if t is None else t[part] for t in by_order)))
        chunks, grid = _tiles(batch, length, d)
        constants = _shape(index, length * 2 * d) | _TILE
        mixer_kernels.conv_backward_input[grid](
            conv_weight, _or(index, xz), _or(inverse, xz), du, dxz, batch, K, length, d, taps, chunks, **constants
        )
    return [dxz, *(torch.cat(gradient) for gradient in zip(*gradients))]


def _mixer_gradients(
    xz, dy, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, index, packed, starts, du
) -> list[torch.Tensor]:
    """Those of some orders' parameters; ``du`` (K, batch, L, d) becomes the gradient before the convolution's SiLU."""
    K, batch, length, d = du.shape
    n, taps = A.shape[2], conv_weight.shape[1]
    u = _convolve(xz, conv_weight, conv_bias, index)
    run = _mixer_scan(u, packed, dt_proj, dt_bias, A, D, index)
    _, ddelta, _, dB, dC, dA, dD = run.backward(starts.flatten(0, 1), dy, du.flatten(0, 1), overwrite=True)
    ddelta, u = (x.view(K, batch * length, d) for x in (ddelta, u))
    dpacked = torch.empty_like(packed)
    dpacked[..., :n] = dB.sum(0).view(K, batch * length, n)
    dpacked[..., n : 2 * n] = dC.sum(0).view(K, batch * length, n)
    dpacked[..., 2 * n :] = ddelta @ dt_proj
    ddt_proj = ddelta.transpose(1, 2) @ packed[..., 2 * n :]
    dx_proj = dpacked.transpose(1, 2) @ u
    du.view(K, batch * length, d).baddbmm_(dpacked, x_proj)
    chunks, grid = _tiles(K * batch, length, d)
    dweight = torch.empty((K, batch * chunks, taps, d), dtype=torch.float32, device=xz.device)
    dbias = torch.empty((K, batch * chunks, d), dtype=torch.float32, device=xz.device)
    mixer_kernels.conv_backward_pre[grid](
        xz, conv_weight, conv_bias, _or(index, xz), du, dweight, dbias, batch, length, d, taps, chunks,
        **_shape(index, length * 2 * d), **_TILE,
    )  # fmt: skip
    ddt_bias = ddelta.sum(1, dtype=torch.float32)
    return [dweight.sum(1), dbias.sum(1), dx_proj, ddt_proj, ddt_bias, dA, dD]


@_mixer_backward.register_fake
def _(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, index, inverse, packed, starts, total, dout):
    inputs = (xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]


def _setup_mixer(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.set_materialize_grads(False)


def _backward_mixer(ctx, dout, *_):
    if dout is None:
        return (None,) * 10
    return *_mixer_backward(*ctx.saved_tensors, dout), None, None


torch.library.register_autograd("segresmamba::mixer", _backward_mixer, setup_context=_setup_mixer)


class _Scan:
    """What the forward and the backward of a scan share."""

    def __init__(self, u, delta, A, B, C, D, z, bias, softplus, index) -> None:
        self.rows, self.length, self.d = u.shape
        self.groups, self.n = B.shape[2], A.shape[2]
        self.batch = self.rows // len(A)
        self.u, self.delta, self.z = u.contiguous(), delta.contiguous(), _or(z, u).contiguous()
        self.B, self.C = (x if _columns(x) else x.contiguous() for x in (B, C))
        self.columns = [_columns(x) for x in (self.B, self.C)]
        self.A2 = (A * _LOG2E).transpose(1, 2).contiguous()
        self.D, self.bias = D.contiguous(), bias.contiguous()
        self.index = _or(index, u)
        self.ahead = _AHEAD if index is None else 1  # elsewhere tokens lie apart, and nothing is gained
        self.steps = _chunk(self.d)
        self.chunks = -(-self.length // self.steps)
        self.grid = (self.rows * self.chunks * self.groups * -(-(self.d // self.groups) // _LANES),)
        self.gated = z is not None
        widest = max(self.d, *(self.groups * columns for columns in self.columns))
        self.constants = {"SOFTPLUS": softplus, **_shape(index, self.length * widest), "T": self.steps}
        self.walk = {"n": self.n, "N": min(_STATES, triton.next_power_of_2(self.n)), "W": _LANES, "num_warps": 1}
        self.tile_of_chunks = {"T": min(_CHUNKS, triton.next_power_of_2(self.chunks)), "W": _ELEMENTS}
        self.sizes = (self.length, self.d, self.groups)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns y (R, L, d) and the chunks' first states, and the last (R, chunks + 1, n, d)."""
        u, delta, bias, A2, B, C = self.u, self.delta, self.bias, self.A2, self.B, self.C
        starts = _starts(u, self.rows, self.length, self.n, self.d)
        ends, sums = self._by_chunk(self.n, self.d), self._by_chunk(self.d)
        scan_kernels.chunk_ends[self.grid](
            u, delta, bias, A2, B, self.index, ends, sums, self.batch, *self.sizes, self.chunks,
            b_columns=self.columns[0], P=self.ahead, **self.constants, **self.walk,
        )  # fmt: skip
        scan_kernels.chunk_starts[self._chunk_grid()](
            A2, ends, sums, starts, self.batch, self.d, self.n, self.chunks, **self.tile_of_chunks
        )
        del ends
        y = torch.empty_like(u)
        total = torch.empty_like(u, dtype=torch.float32) if self.n > _STATES else y
        scan_kernels.scan_apply[self.grid](
            u, delta, bias, A2, B, C, self.D, self.z, self.index, starts, total, y, self.batch, *self.sizes,
            self.chunks, b_columns=self.columns[0], c_columns=self.columns[1], GATED=self.gated, P=1,
            **self.constants, **self.walk,
        )  # fmt: skip
        return y, starts

    def backward(
        self, starts: torch.Tensor, dy: torch.Tensor, du: torch.Tensor | None = None, overwrite: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """
        Returns du, ddelta, dz (R, L, d), dB, dC (parts, R, L, g, n), dA (K, d, n), dD (K, d).
        ``dy`` may have the rows of one order, which the orders then share; ``du`` is written to where it is given, and
        ddelta over delta with ``overwrite``.
        """
        u, delta, bias, A2, B, C = self.u, self.delta, self.bias, self.A2, self.B, self.C
        dy = dy.contiguous()
        like = {"dtype": torch.float32, "device": u.device}
        carries, sums = self._by_chunk(self.n, self.d), self._by_chunk(self.d)
        scan_kernels.chunk_carries[self.grid](
            delta, bias, A2, C, self.z, self.index, dy, carries, sums, self.batch, len(dy), *self.sizes, self.chunks,
            c_columns=self.columns[1], GATED=self.gated, P=self.ahead, **self.constants, **self.walk,
        )  # fmt: skip
        gradients = torch.empty_like(carries)
        scan_kernels.chunk_gradients[self._chunk_grid()](
            A2, carries, sums, gradients, self.batch, self.d, self.n, self.chunks, **self.tile_of_chunks
        )
        del carries
        du = torch.empty_like(u) if du is None else du
        # More states are gone through in several turns, which each read delta.
        ddelta = delta if overwrite and self.n <= _STATES else torch.empty_like(delta)
        dz = torch.empty_like(self.z) if self.gated else du
        # Sums over channels: as few parts, which take memory, as keep the GPU busy.
        blocks = -(-(self.d // self.groups) // _CHANNELS)
        blocks_of_part = -(-blocks // min(blocks, -(-_PROGRAMS // (self.rows * self.chunks * self.groups))))
        parts = -(-blocks // blocks_of_part)
        dB, dC = (torch.empty((parts, self.rows, self.length, self.groups, self.n), **like) for _ in range(2))
        dD = self._by_chunk(self.d)
        total = torch.empty((self.rows, 3, self.length, self.d), **like) if self.n > _STATES else u
        programs = self.rows * self.chunks * self.groups * parts
        pieces = torch.empty((programs, self.steps // _PIECE, self.walk["N"], _CHANNELS), **like)
        scan_kernels.scan_gradients[(programs,)](
            u, delta, bias, A2, B, C, self.D, self.z, self.index, starts, dy, gradients, pieces, total, du, ddelta, dz,
            dB, dC, dD, self.batch, len(dy), self.rows, *self.sizes, self.chunks, parts, blocks_of_part,
            b_columns=self.columns[0], c_columns=self.columns[1], GATED=self.gated,
            COUNT=1 if self.d // self.groups % 2 else 2, **self.constants, P=_PIECE, maxnreg=_REGISTERS,
            **{**self.walk, "W": _CHANNELS},
        )  # fmt: skip
        K = len(A2)
        dA = gradients.view(K, -1, self.n, self.d).sum(1).transpose(1, 2).contiguous()
        return du, ddelta, dz, dB, dC, dA, dD.view(K, -1, self.d).sum(1)

    def _by_chunk(self, *sizes: int) -> torch.Tensor:
        return torch.empty((self.rows, self.chunks, *sizes), dtype=torch.float32, device=self.u.device)

    def _chunk_grid(self) -> tuple[int]:
        return (self.rows * -(-self.n * self.d // _ELEMENTS),)


def _mixer_scan(u, packed, dt_proj, dt_bias, A, D, index) -> _Scan:
    K, batch, length, d = u.shape
    n = A.shape[2]
    delta = (packed[..., 2 * n :] @ dt_proj.transpose(1, 2)).view(K * batch, length, d)
    columns = packed.view(K * batch, length, 1, -1)
    B, C = columns[..., :n], columns[..., n : 2 * n]
    return _Scan(u.view(K * batch, length, d), delta, A, B, C, D, None, dt_bias, True, index)


def _convolve(xz, weight, bias, index) -> torch.Tensor:
    (batch, length, _), (K, taps, d) = xz.shape, weight.shape
    u = xz.new_empty(K, batch, length, d)
    chunks, grid = _tiles(K * batch, length, d)
    constants = _shape(index, length * 2 * d) | _TILE
    mixer_kernels.conv_forward[grid](xz, weight, bias, _or(index, xz), u, batch, length, d, taps, chunks, **constants)
    return u


def _chunk(d: int) -> int:
    """
    Steps of a chunk. A level has the fewer tokens the more channels it has, and a GPU must be filled on each; the
    length itself is not asked, so that it may be symbolic.
    """
    return 128 if d <= 128 else 64 if d <= 256 else 16


def _tiles(rows: int, length: int, d: int) -> tuple[int, tuple[int]]:
    """Chunks of the convolution, and its grid."""
    chunks = -(-length // _STEPS)
    return chunks, (rows * chunks * -(-d // _WIDTH),)


def _shape(index: torch.Tensor | None, elements: int) -> dict[str, int]:
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


def _or(x: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A kernel takes a pointer for each argument, also for one that it does not look at."""
    return other if x is None else x
