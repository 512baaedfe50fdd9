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
The ``triton`` engine's mixer as an operator of PyTorch: convolution, projections, scan and gate, and their backward,
order by order where a volume is large. Shapes: xz (batch, L, 2 d), K orders, conv_weight (K, taps, d), x_proj (K, 2 n +
rank, d), with B and C before dt, dt_proj (K, d, rank), A (K, d, n), all else (K, d); index, inverse (K, L) int32.
"""

from __future__ import annotations

import torch

from . import triton_mixer_kernels as kernels
from .triton_scan import Scan, chunk_states, or_any, shape_constants

__all__ = ["mixer_operator"]

_TILE = {"T": 128, "W": 32}  # of the convolution: steps, channels
_GATE = 1024  # elements of a program of the gate
_TOGETHER = 2**23  # elements of an order, up to which all orders are taken at once; one with more fills a GPU itself


@torch.library.custom_op("segresmamba::mixer", mutates_args=())
def mixer_operator(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gated sum over the orders (batch, L, d); for the backward, the chunks' first states and the sum."""
    (batch, length, _), (K, d, n) = xz.shape, A.shape
    with torch.cuda.device_of(xz), torch.autocast(xz.device.type, enabled=False):
        y, starts = xz.new_empty(K, batch, length, d), chunk_states(xz, K * batch, length, n, d).unflatten(0, (K, -1))
        for part in _parts(K, y[0].numel()):
            by_order = (conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, index, y, starts)
            _forward(xz, *(None if t is None else t[part] for t in by_order))
        out, total = torch.empty_like(y[0]), torch.empty_like(y[0])
        kernels.gate_forward[_gate_grid(out)](xz, y, out, total, out.numel(), K, d, W=_GATE)
    return out, starts.flatten(0, 1), total


@mixer_operator.register_fake
def _(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, index, inverse):
    (batch, length, _), (K, d, n) = xz.shape, A.shape
    out = xz.new_empty(batch, length, d)
    return out, chunk_states(xz, K * batch, length, n, d), torch.empty_like(out)


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
    starts: torch.Tensor,
    total: torch.Tensor,
    dout: torch.Tensor,
) -> list[torch.Tensor]:
    (batch, length, _), (K, taps, d) = xz.shape, conv_weight.shape
    parameters = (conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D)
    with torch.cuda.device_of(xz), torch.autocast(xz.device.type, enabled=False):
        dout, dy = dout.contiguous(), torch.empty_like(total)
        kernels.gate_backward_total[_gate_grid(dy)](xz, dout, dy, dy.numel(), d, W=_GATE)
        parts = _parts(K, dy.numel())
        before, gradients = None, []  # the sum over the orders before
        for part in parts:
            by_order = (*parameters, index, starts.unflatten(0, (K, batch)))
            du, *others = _gradients(xz, dy, *(None if t is None else t[part] for t in by_order))
            gradients.append(others)
            dx = torch.empty_like(xz if part is parts[-1] else dy)
            chunks, grid = _tiles(batch, length, d)
            kernels.conv_backward_input[grid](
                conv_weight[part], *(xz if i is None else i[part] for i in (index, inverse)), du,
                or_any(before, dx), dx, batch, len(du), length, d, dx.shape[2], taps, chunks,
                ADD=before is not None, **shape_constants(index, length * 2 * d), **_TILE,
            )  # fmt: skip
            before = dx
            del du
        kernels.gate_backward_z[_gate_grid(total)](xz, total, dout, dx, total.numel(), d, W=_GATE)
    return [dx, *(torch.cat(gradient) for gradient in zip(*gradients))]


@_mixer_backward.register_fake
def _(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, index, inverse, starts, total, dout):
    inputs = (xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, *_):
    if dout is None:
        return (None,) * 10
    return *_mixer_backward(*ctx.saved_tensors, dout), None, None


torch.library.register_autograd("segresmamba::mixer", _backward, setup_context=_setup)


def _parts(K: int, elements: int) -> list[slice]:
    """The orders that are taken at once."""
    return [slice(k, k + 1) for k in range(K)] if elements > _TOGETHER else [slice(0, K)]


def _forward(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, index, y, starts) -> None:
    """Of some orders: ``y`` (K, batch, L, d) and the states at chunks' ``starts``, which are written to."""
    u = _convolve(xz, conv_weight, conv_bias, index)
    _scan(u, _project(u, x_proj), dt_proj, dt_bias, A, D, index).forward(y.flatten(0, 1), starts.flatten(0, 1))


def _gradients(
    xz, dy, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, index, starts
) -> tuple[torch.Tensor, ...]:
    """Of some orders: the gradient before the convolution's SiLU (K, batch, L, d), and those of the parameters."""
    (batch, length, d), (K, _, n), taps = dy.shape, A.shape, conv_weight.shape[1]
    u = _convolve(xz, conv_weight, conv_bias, index)
    packed = _project(u, x_proj)
    large = dy.numel() > _TOGETHER
    run = _scan(u, packed, dt_proj, dt_bias, A, D, index)
    du, ddelta, _, dB, dC, dA, dD = run.backward(starts.flatten(0, 1), dy, lean=large)
    del run
    over_u = du.data_ptr() == u.data_ptr()
    du, ddelta = (x.view(K, batch * length, d) for x in (du, ddelta))
    dpacked = torch.empty_like(packed)
    dpacked[..., :n] = dB.sum(0).view(K, batch * length, n)
    dpacked[..., n : 2 * n] = dC.sum(0).view(K, batch * length, n)
    del dB, dC
    dpacked[..., 2 * n :] = ddelta @ dt_proj
    ddt_proj = ddelta.transpose(1, 2) @ packed[..., 2 * n :]
    ddt_bias = ddelta.sum(1, dtype=torch.float32)
    del ddelta
    if over_u:
        u = _convolve(xz, conv_weight, conv_bias, index)
    dx_proj = dpacked.transpose(1, 2) @ u.view(K, batch * length, d)
    du.baddbmm_(dpacked, x_proj)
    chunks, grid = _tiles(K * batch, length, d)
    dweight = torch.empty((K, batch * chunks, taps, d), dtype=torch.float32, device=xz.device)
    dbias = torch.empty((K, batch * chunks, d), dtype=torch.float32, device=xz.device)
    kernels.conv_backward_pre[grid](
        xz, conv_weight, conv_bias, or_any(index, xz), du, dweight, dbias, batch, length, d, taps, chunks,
        **shape_constants(index, length * 2 * d), **_TILE,
    )  # fmt: skip
    return du.view(K, batch, length, d), dweight.sum(1), dbias.sum(1), dx_proj, ddt_proj, ddt_bias, dA, dD


def _convolve(xz, weight, bias, index) -> torch.Tensor:
    (batch, length, _), (K, taps, d) = xz.shape, weight.shape
    u = xz.new_empty(K, batch, length, d)
    chunks, grid = _tiles(K * batch, length, d)
    kernels.conv_forward[grid](
        xz, weight, bias, or_any(index, xz), u, batch, length, d, taps, chunks,
        **shape_constants(index, length * 2 * d), **_TILE,
    )  # fmt: skip
    return u


def _project(u: torch.Tensor, x_proj: torch.Tensor) -> torch.Tensor:
    """B, C and dt side by side (K, batch * L, 2 n + rank)."""
    return u.flatten(1, 2) @ x_proj.transpose(1, 2)


def _scan(u, packed, dt_proj, dt_bias, A, D, index) -> Scan:
    (K, batch, length, d), n = u.shape, A.shape[2]
    delta = (packed[..., 2 * n :] @ dt_proj.transpose(1, 2)).view(K * batch, length, d)
    columns = packed.view(K * batch, length, 1, -1)
    B, C = columns[..., :n], columns[..., n : 2 * n]
    return Scan(u.flatten(0, 1), delta, A, B, C, D, None, dt_bias, True, index)


def _tiles(rows: int, length: int, d: int) -> tuple[int, tuple[int]]:
    """Chunks of the convolution, and its grid."""
    chunks = -(-length // _TILE["T"])
    return chunks, (rows * chunks * -(-d // _TILE["W"]),)


def _gate_grid(x: torch.Tensor) -> tuple[int]:
    return (-(-x.numel() // _GATE),)
