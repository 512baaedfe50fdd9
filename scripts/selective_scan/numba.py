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

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import numba_kernels as kernels
from .orders import order_steps
from .threads import run_shares

__all__ = ["MIXER_MULTIPLE", "mixer", "scan"]

MIXER_MULTIPLE = kernels.LANES  # the widths that the fused mixer takes are multiples of this


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
    Scan on the CPU in kernels compiled by numba: one pass over the tokens for each block of channels, softplus, bias
    and ``D u`` fused, in float32. Arguments and returns as :py:func:`.reference.scan`.
    """
    dtype, d = u.dtype, u.shape[2]
    u, delta, A, B, C = (t.float() for t in (u, delta, A, B, C))
    D = u.new_zeros(d) if D is None else D.float()
    bias = u.new_zeros(d) if delta_bias is None else delta_bias.float()
    y, last_state = _Scan.apply(u, delta, A, B, C, D, bias, delta_softplus, index, torch.is_grad_enabled())
    if z is not None:
        y = y * F.silu(z.float())
    return y.to(dtype), last_state


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
    :py:func:`scripts.selective_scan.oriented_mixer` fused for the CPU: convolution and SiLU in one pass over the
    tokens, dt_proj, softplus and ``D u`` inside the scan, the orders side by side, their sum and the gate in one pass.

    Autograd keeps, in bytes a token beside the tokens and the parameters: 4 * (2 d for x and z + d for the sum + K
    (dt_rank + 2 n) for dt, B and C + K n d / 64 for the chunks' first states); the convolution and the scan are
    recomputed.
    """
    xz = tokens if in_proj_weight is None else F.linear(tokens, in_proj_weight)
    dtype = xz.dtype
    tensors = (xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D)
    with torch.autocast("cpu", enabled=False):
        return _Mixer.apply(*(t.float() for t in tensors), tuple(indices), torch.is_grad_enabled()).to(dtype)


class _Scan(torch.autograd.Function):
    """u, delta (batch, L, d), A (d, n), B, C (batch, L, g, n), D, bias (d,), index (L,) or None."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, bias, softplus, index, training):
        steps = _steps((index,), u.shape[1])
        shared = _ScanArguments(u, delta, None, bias, softplus, A, D, B, 0, C, 0, steps)
        y, states, ends = shared.forward(keep_states=training and any(ctx.needs_input_grad))
        ctx.save_for_backward(u, delta, A, B, C, D, bias, torch.from_numpy(states))
        ctx.softplus, ctx.steps = softplus, steps
        last_state = torch.from_numpy(ends)
        ctx.mark_non_differentiable(last_state)
        return torch.from_numpy(y), last_state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        u, delta, A, B, C, D, bias, states = ctx.saved_tensors
        shared = _ScanArguments(u, delta, None, bias, ctx.softplus, A, D, B, 0, C, 0, ctx.steps)
        du, ddelta, dB, dC, _, dA, dD, dbias = shared.backward(states.numpy(), _array(dy))
        dB, dC = (torch.from_numpy(x).sum(0) for x in (dB, dC))
        dA, dD, dbias = (torch.from_numpy(x).sum(0) for x in (dA, dD, dbias))
        return torch.from_numpy(du), torch.from_numpy(ddelta), dA.t(), dB, dC, dD, dbias, None, None, None


class _Mixer(torch.autograd.Function):
    """Arguments as :py:func:`mixer`, all float32."""

    @staticmethod
    def forward(ctx, xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, indices, grad):
        batch, length = xz.shape[:2]
        K, d = conv_bias.shape
        rank, n = dt_proj.shape[2], A.shape[2]
        training = grad and any(ctx.needs_input_grad)
        steps = _steps(indices, length)
        u = _convolve(xz, conv_weight, conv_bias, steps)
        dt_B_C = torch.empty(K, batch * length, rank + 2 * n)
        for k in range(K):  # one by one they are faster than as a batch
            torch.mm(u[k].view(-1, d), x_proj[k].t(), out=dt_B_C[k])
        packed = dt_B_C.view(K * batch, length, 1, rank + 2 * n)
        shared = _ScanArguments(
            u.view(K * batch, length, d), None, dt_proj, dt_bias, True, A, D, packed, rank, packed, rank + n, steps
        )
        # Fresh memory costs more than the arithmetic on it: the scan's output takes the place of its input, and without
        # a backward the gate's the place of the first order's.
        y, states, _ = shared.forward(keep_states=training, in_place=True)
        y = y.reshape(K, batch, length, d)
        out = np.empty((batch, length, d), np.float32) if training else y[0]
        kept = np.empty(out.shape if training else (0, 0, 0), np.float32)
        _run(kernels.gate_forward, batch * length, _array(xz), y, out, kept)
        if training:
            arrays = (torch.from_numpy(states), torch.from_numpy(kept))
            ctx.save_for_backward(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, dt_B_C, *arrays)
            ctx.steps = steps
        return torch.from_numpy(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, dt_B_C, states, kept = ctx.saved_tensors
        batch, length = xz.shape[:2]
        K, d = conv_bias.shape
        rank, n = dt_proj.shape[2], A.shape[2]
        xz_, dxz = _array(xz), np.empty(xz.shape, np.float32)
        dy = np.empty((batch, length, d), np.float32)
        _run(kernels.gate_backward, batch * length, xz_, kept.numpy(), _array(dout), dy, dxz)

        u = _convolve(xz, conv_weight, conv_bias, ctx.steps)
        packed = dt_B_C.view(K * batch, length, 1, rank + 2 * n)
        shared = _ScanArguments(
            u.view(K * batch, length, d), None, dt_proj, dt_bias, True, A, D, packed, rank, packed, rank + n, ctx.steps
        )
        du_, _, ddt_B_C_, _, *sums = shared.backward(states.numpy(), dy)
        ddt_proj, dA, dD, ddt_bias = (torch.from_numpy(x).unflatten(0, (K, batch)).sum(1) for x in sums)
        u = u.view(K, batch * length, d)
        du = torch.from_numpy(du_).view(K, batch * length, d)
        ddt_B_C = torch.from_numpy(ddt_B_C_)
        ddt_B_C = (ddt_B_C[0] if len(ddt_B_C) == 1 else ddt_B_C.sum(0)).view(K, batch * length, rank + 2 * n)
        for k in range(K):
            du[k].addmm_(ddt_B_C[k], x_proj[k])
        dx_proj = torch.stack([ddt_B_C[k].t() @ u[k] for k in range(K)])

        weight, bias = _array(conv_weight.transpose(1, 2)), _array(conv_bias)
        dpre = du_.reshape(K, batch, length, d)
        parts = _threads()
        dweight, dbias = np.zeros((parts, *weight.shape), np.float32), np.zeros((parts, *bias.shape), np.float32)
        _run(kernels.conv_backward_pre, batch * length, xz_, weight, bias, *ctx.steps, dpre, dweight, dbias, parts=True)
        _run(kernels.conv_backward_input, batch * length, weight, *ctx.steps, dpre, dxz)
        dconv_weight = torch.from_numpy(dweight).sum(0).transpose(1, 2)
        dconv_bias = torch.from_numpy(dbias).sum(0)
        ddt_proj, dA = ddt_proj.transpose(1, 2), dA.transpose(1, 2)
        return torch.from_numpy(dxz), dconv_weight, dconv_bias, dx_proj, ddt_proj, ddt_bias, dA, dD, None, None


class _ScanArguments:
    """What the forward and the backward kernel share, as arrays. K parameter sets, rows = K * batch."""

    def __init__(self, u, delta, dt_weight, bias, softplus, A, D, B, b0, C, c0, steps) -> None:
        A, D, bias = (t.unsqueeze(0) if t.ndim == rank else t for t, rank in ((A, 2), (D, 1), (bias, 1)))
        K, d, n = A.shape
        self.rows, self.length, self.width = u.shape[0], u.shape[1], d // B.shape[2]
        self.groups, self.columns, self.n = B.shape[2], B.shape[3], n
        self.decaying = softplus and not bool((A > 0).any())
        self.rank = 0 if dt_weight is None else dt_weight.shape[2]
        self.packed = B is C and b0 != c0  # one tensor holds dt, B and C
        none = np.empty((0, 0, 0), np.float32)
        no_rank = np.empty((K, 0, d), np.float32)
        self.arguments = (
            self.rows // K,
            _array(u),
            none if delta is None else _array(delta),
            no_rank if dt_weight is None else _array(dt_weight.transpose(1, 2)),
            _array(bias),
            softplus,
            _array((torch.where(A.isnan(), float("nan"), A) * float(kernels.LOG2E)).transpose(1, 2)),
            _array(D),
            _array(B),
            b0,
            _array(C),
            c0,
            steps[0],
        )

    def forward(self, keep_states: bool, in_place: bool = False):
        """Returns y (rows, L, d), the chunks' first states (rows, chunks, n, d) or an empty array, last states."""
        d = self.width * self.groups
        y = self.arguments[1] if in_place else np.empty((self.rows, self.length, d), np.float32)
        chunks = -(-self.length // kernels.TOKENS)
        states = np.empty((self.rows, chunks, self.n, d) if keep_states else (0, 0, 0, 0), np.float32)
        ends = np.empty((self.rows, d, self.n), np.float32)
        W = self._block((16, 32, 48, 64, 96, 128), overhead=40)
        tasks = self.rows * self.groups * -(-self.width // W)
        _run(kernels.scan_forward(W, self.decaying), tasks, *self.arguments, y, states, ends)
        return y, states, ends

    def backward(self, states: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, ...]:
        """
        Returns du (rows, L, d), ddelta as du (empty where dt is low-rank; its gradient then lies before dB), dB, dC
        (blocks, rows, L, g, columns), and the rows' parts of ddt_weight (rows, rank, d), dA (rows, n, d), dD, dbias.
        """
        W = self._block((32, 64, 96), overhead=16)
        blocks = -(-self.width // W)
        d = self.width * self.groups
        du = np.empty((self.rows, self.length, d), np.float32)
        ddelta = np.empty((0, 0, 0) if self.rank else du.shape, np.float32)
        dB = np.empty((blocks, self.rows, self.length, self.groups, self.columns), np.float32)
        dC = dB if self.packed else np.empty_like(dB)
        sums = [np.empty((self.rows, m, d), np.float32) for m in (self.rank, self.n)]
        sums += [np.empty((self.rows, d), np.float32) for _ in range(2)]
        tasks = self.rows * self.groups * blocks
        _run(
            kernels.scan_backward(W, self.decaying),
            tasks,
            *self.arguments,
            states,
            dy,
            du,
            ddelta,
            sums[0],
            dB,
            dC,
            *sums[1:],
        )
        return du, ddelta, dB, dC, *sums

    def _block(self, widths: Sequence[int], overhead: int) -> int:
        """
        Channels of a block. Wide blocks spread what a token costs whatever the width (``overhead``, in channels), but
        there must be work for every thread, and lanes beyond the last channel are wasted.
        """

        def cost(W: int) -> int:
            tasks = self.rows * self.groups * -(-self.width // W)
            return -(-tasks // _threads()) * (W + overhead)

        return min(widths, key=cost)


def _convolve(xz, conv_weight, conv_bias, steps) -> torch.Tensor:
    """SiLU of the convolution along each order, (K, batch, L, d)."""
    batch, length = xz.shape[:2]
    u = np.empty((conv_bias.shape[0], batch, length, conv_bias.shape[1]), np.float32)
    weight = _array(conv_weight.transpose(1, 2))
    _run(kernels.conv_forward, batch * length, _array(xz), weight, _array(conv_bias), *steps, u)
    return torch.from_numpy(u)


def _array(x: torch.Tensor) -> np.ndarray:
    return x.detach().contiguous().numpy()


def _steps(indices: Sequence[torch.Tensor | None], length: int) -> tuple[np.ndarray, np.ndarray]:
    """:py:func:`order_steps` as arrays."""
    index, inverse = order_steps(indices, length, torch.device("cpu"))
    return index.numpy(), inverse.numpy()


def _threads() -> int:
    return torch.get_num_threads()


def _run(kernel: Callable, tasks: int, *arguments, parts: bool = False) -> None:
    """Share tasks 0 .. tasks - 1 between threads; with ``parts`` the kernel is told which thread's share it is."""
    threads = min(_threads(), tasks)
    bounds = [tasks * i // threads for i in range(threads + 1)]

    def share(i: int) -> None:
        kernel(bounds[i], bounds[i + 1], *((i,) if parts else ()), *arguments)

    run_shares(share, threads)
