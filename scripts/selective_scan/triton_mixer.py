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
The ``triton`` engine's mixer as operators of PyTorch: convolution, projections and scan, order by order where a volume
is large, and the gate. Shapes: x (batch, L, d), K orders, conv_weight (K, taps, d), x_proj (K, 2 n + rank, d), with B
and C before dt, dt_proj (K, d, rank), A (K, d, n), all else (K, d); index, inverse (K, L) int32.
"""

from __future__ import annotations

import torch

from . import triton_mixer_kernels as kernels
from .triton_scan import Scan, chunk_states, or_any, shape_constants

__all__ = ["gate_operator", "mixer_operator"]

_TILE = {"T": 128, "W": 32}  # of the convolution: steps, channels
_GATE = 1024  # elements of a program of the gate
_TOGETHER = 2**23  # elements of an order, up to which all orders are taken at once; one with more fills a GPU itself


@torch.library.custom_op("segresmamba::mixer", mutates_args=())
def mixer_operator(
    x: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    x_proj: torch.Tensor,
    dt_proj: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    index: torch.Tensor | None,
    inverse: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the sum over the orders (batch, L, d), not yet gated, and for the backward the chunks' first states."""
    (batch, length, d), K, n = x.shape, len(A), A.shape[2]
    x = x.contiguous()
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        y, starts = x.new_empty(K, batch, length, d), chunk_states(x, K * batch, length, n, d).unflatten(0, (K, -1))
        for part in _parts(K, x.numel()):
            by_order = (conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, index, y, starts)
            _forward(x, *(None if t is None else t[part] for t in by_order))
        return y[0] if K == 1 else y.sum(0), starts.flatten(0, 1)


@mixer_operator.register_fake
def _(x, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, index, inverse):
    (batch, length, d), K, n = x.shape, len(A), A.shape[2]
    return x.new_empty(batch, length, d), chunk_states(x, K * batch, length, n, d)


@torch.library.custom_op("segresmamba::mixer_backward", mutates_args=())
def _mixer_backward(
    x: torch.Tensor,
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
    dy: torch.Tensor,
) -> list[torch.Tensor]:
    (batch, length, _), (K, taps, d) = x.shape, conv_weight.shape
    parameters = (conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D)
    x, dy = x.contiguous(), dy.contiguous()
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        dx = torch.empty_like(x)
        gradients: list[list[torch.Tensor]] = []
        for part in _parts(K, x.numel()):
            by_order = (*parameters, index, starts.unflatten(0, (K, batch)))
            du, *others = _gradients(x, dy, *(None if t is None else t[part] for t in by_order))
            chunks, grid = _tiles(batch, length, d)
            kernels.conv_backward_input[grid](
                conv_weight[part], *(x if i is None else i[part] for i in (index, inverse)), du, dx, batch, len(du),
                length, d, taps, chunks, ADD=bool(gradients), **shape_constants(index, length * d), **_TILE,
            )  # fmt: skip
            gradients.append(others)
            del du
    return [dx, *(torch.cat(gradient) for gradient in zip(*gradients))]


@_mixer_backward.register_fake
def _(x, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, index, inverse, starts, dy):
    inputs = (x, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]


def _setup_mixer(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _backward_mixer(ctx, dy, _):
    if dy is None:
        return (None,) * 10
    return *_mixer_backward(*ctx.saved_tensors, dy), None, None


torch.library.register_autograd("segresmamba::mixer", _backward_mixer, setup_context=_setup_mixer)


@torch.library.custom_op("segresmamba::gate", mutates_args=())
def gate_operator(total: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """``total * SiLU(z)``, of one shape and dtype; keeps these two alone for the backward."""
    total, z = total.contiguous(), z.contiguous()
    with torch.cuda.device_of(z):
        out = torch.empty_like(total)
        kernels.gate_forward[_gate_grid(out)](total, z, out, out.numel(), W=_GATE)
    return out


@gate_operator.register_fake
def _(total, z):
    return torch.empty_like(total, memory_format=torch.contiguous_format)


@torch.library.custom_op("segresmamba::gate_backward", mutates_args=())
def _gate_backward(total: torch.Tensor, z: torch.Tensor, dout: torch.Tensor) -> list[torch.Tensor]:
    total, z, dout = total.contiguous(), z.contiguous(), dout.contiguous()
    with torch.cuda.device_of(z):
        dtotal, dz = torch.empty_like(total), torch.empty_like(z)
        kernels.gate_backward[_gate_grid(dz)](total, z, dout, dtotal, dz, dz.numel(), W=_GATE)
    return [dtotal, dz]


@_gate_backward.register_fake
def _(total, z, dout):
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (total, z)]


def _setup_gate(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_gate(ctx, dout):
    return tuple(_gate_backward(*ctx.saved_tensors, dout))


torch.library.register_autograd("segresmamba::gate", _backward_gate, setup_context=_setup_gate)


def _parts(K: int, elements: int) -> list[slice]:
    """The orders that are taken at once."""
    return [slice(k, k + 1) for k in range(K)] if elements > _TOGETHER else [slice(0, K)]


def _forward(x, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, index, y, starts) -> None:
    """Of some orders: ``y`` (K, batch, L, d) and the states at chunks' ``starts``, which are written to."""
    u = _convolve(x, conv_weight, conv_bias, index)
    _scan(u, _project(u, x_proj), dt_proj, dt_bias, A, D, index).forward(y.flatten(0, 1), starts.flatten(0, 1))


def _gradients(
    x, dy, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, index, starts
) -> tuple[torch.Tensor, ...]:
    """Of some orders: the gradient before the convolution's SiLU (K, batch, L, d), and those of the parameters."""
    (batch, length, d), (K, _, n), taps = dy.shape, A.shape, conv_weight.shape[1]
    u = _convolve(x, conv_weight, conv_bias, index)
    packed = _project(u, x_proj)
    large = dy.numel() > _TOGETHER
    run = _scan(u, packed, dt_proj, dt_bias, A, D, index)
    du, ddelta, _, dB, dC, dA, dD = run.backward(starts.flatten(0, 1), dy, lean=large)
    del run
    over_u = du.data_ptr() == u.data_ptr()
    du, ddelta = (t.view(K, batch * length, d) for t in (du, ddelta))
    dpacked = torch.empty_like(packed)
    dpacked[..., :n] = dB.sum(0).view(K, batch * length, n)
    dpacked[..., n : 2 * n] = dC.sum(0).view(K, batch * length, n)
    del dB, dC
    dpacked[..., 2 * n :] = ddelta @ dt_proj
    ddt_proj = ddelta.transpose(1, 2) @ packed[..., 2 * n :]
    ddt_bias = ddelta.sum(1, dtype=torch.float32)
    del ddelta
    if over_u:
        u = _convolve(x, conv_weight, conv_bias, index)
    dx_proj = dpacked.transpose(1, 2) @ u.view(K, batch * length, d)
    du.baddbmm_(dpacked, x_proj)
    chunks, grid = _tiles(K * batch, length, d)
    dweight = torch.empty((K, batch * chunks, taps, d), dtype=torch.float32, device=x.device)
    dbias = torch.empty((K, batch * chunks, d), dtype=torch.float32, device=x.device)
    kernels.conv_backward_pre[grid](
        x, conv_weight, conv_bias, or_any(index, x), du, dweight, dbias, batch, length, d, taps, chunks,
        **shape_constants(index, length * d), **_TILE,
    )  # fmt: skip
    return du.view(K, batch, length, d), dweight.sum(1), dbias.sum(1), dx_proj, ddt_proj, ddt_bias, dA, dD


def _convolve(x, weight, bias, index) -> torch.Tensor:
    (batch, length, d), (K, taps, _) = x.shape, weight.shape
    u = x.new_empty(K, batch, length, d)
    chunks, grid = _tiles(K * batch, length, d)
    kernels.conv_forward[grid](
        x, weight, bias, or_any(index, x), u, batch, length, d, taps, chunks,
        **shape_constants(index, length * d), **_TILE,
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
