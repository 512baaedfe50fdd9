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
The kernels around the scan in the ``triton`` engine's mixer: the convolution along each order, whose program holds a
tile of T steps by W channels, and the gate.

Names: L tokens, d channels, K orders, taps of a convolution. ``index`` (K, L) is the token at each step of an order,
``inverse`` (K, L) the step of each token; without ``ORDERED`` the order is the raster's. Arrays are contiguous; x, u,
total, z and their gradients come in any floating dtype, all else in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import place, tokens_of

__all__ = [
    "conv_backward_input",
    "conv_backward_pre",
    "conv_forward",
    "gate_backward",
    "gate_forward",
]


@triton.jit
def _convolved(
    x, weight, bias, index, k, b, chunk, channels, valid, L, d, taps: tl.constexpr,
    ORDERED: tl.constexpr, WIDE: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The causal convolution of a tile of steps (T, W), before SiLU."""
    steps = chunk * T + tl.arange(0, T)
    pre = tl.zeros((T, W), dtype=tl.float32)
    pre += tl.load(bias + k * d + channels, mask=valid, other=0.0)[None, :]
    for back in tl.static_range(taps):
        step = steps - back
        there = (step >= 0) & (step < L)
        token = tokens_of(index, k, step, there, L, ORDERED, WIDE)
        w = tl.load(weight + (k * taps + taps - 1 - back) * d + channels, mask=valid, other=0.0)
        at = token[:, None] * d + channels[None, :]
        value = tl.load(x + b * L * d + at, mask=there[:, None] & valid[None, :], other=0.0)
        pre += w[None, :] * value.to(tl.float32)
    return pre


@triton.jit
def conv_forward(
    x, weight, bias, index, u, batch, L, d, taps: tl.constexpr, chunks,
    ORDERED: tl.constexpr, WIDE: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """
    Causal depthwise convolution along each order and SiLU: x (batch, L, d), weight (K, taps, d), bias (K, d) to u (K,
    batch, L, d). The grid is (K * batch * chunks * channel blocks,).
    """
    chunk, r, _, channels, valid = place(d, 1, chunks, W)
    k, b = r // batch, r % batch
    pre = _convolved(x, weight, bias, index, k, b, chunk, channels, valid, L, d, taps, ORDERED, WIDE, T, W)
    steps = chunk * T + tl.arange(0, T)
    live = steps < L
    token = tokens_of(index, k, steps, live, L, ORDERED, WIDE)
    at = token[:, None] * d + channels[None, :]
    tl.store(u + r * L * d + at, (pre * tl.sigmoid(pre)).to(u.dtype.element_ty), mask=live[:, None] & valid[None, :])


@triton.jit
def conv_backward_pre(
    x, weight, bias, index, du, dweight, dbias, batch, L, d, taps: tl.constexpr, chunks,
    ORDERED: tl.constexpr, WIDE: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """
    First half of its backward: du (K, batch, L, d) becomes the gradient before SiLU, in place; each chunk's part of
    dweight (K, batch, chunks, taps, d) and dbias (K, batch, chunks, d). Grid as above.
    """
    chunk, r, _, channels, valid = place(d, 1, chunks, W)
    k, b = r // batch, r % batch
    pre = _convolved(x, weight, bias, index, k, b, chunk, channels, valid, L, d, taps, ORDERED, WIDE, T, W)
    steps = chunk * T + tl.arange(0, T)
    live = steps < L
    token = tokens_of(index, k, steps, live, L, ORDERED, WIDE)
    mask = live[:, None] & valid[None, :]
    at = token[:, None] * d + channels[None, :]
    s = tl.sigmoid(pre)
    g = tl.load(du + r * L * d + at, mask=mask, other=0.0).to(tl.float32) * s * (1.0 + pre * (1.0 - s))
    tl.store(du + r * L * d + at, g.to(du.dtype.element_ty), mask=mask)
    tl.store(dbias + (r * chunks + chunk) * d + channels, tl.sum(g, axis=0), mask=valid)
    for back in tl.static_range(taps):
        step = steps - back
        there = (step >= 0) & live
        source = tokens_of(index, k, step, there, L, ORDERED, WIDE)
        at_source = source[:, None] * d + channels[None, :]
        value = tl.load(x + b * L * d + at_source, mask=there[:, None] & valid[None, :], other=0.0).to(tl.float32)
        at_weight = ((r * chunks + chunk) * taps + taps - 1 - back) * d + channels
        tl.store(dweight + at_weight, tl.sum(g * value, axis=0), mask=valid)


@triton.jit
def conv_backward_input(
    weight, index, inverse, dpre, dx, batch, K, L, d, taps: tl.constexpr, chunks,
    ADD: tl.constexpr, ORDERED: tl.constexpr, WIDE: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """
    Second half: dpre (K, batch, L, d) to dx (batch, L, d), with ``ADD`` to what is there. The grid is (batch * chunks
    of tokens * channel blocks,).
    """
    chunk, b, _, channels, valid = place(d, 1, chunks, W)
    token = chunk * T + tl.arange(0, T)
    live = token < L
    mask = live[:, None] & valid[None, :]
    at_dx = (b * L + token)[:, None] * d + channels[None, :]
    g = tl.zeros((T, W), dtype=tl.float32)
    if ADD:
        g += tl.load(dx + at_dx, mask=mask, other=0.0).to(tl.float32)
    for order in range(K):
        k = b * 0 + order  # 64 bits wide
        step = token
        if ORDERED:
            step = tl.load(inverse + k * L + token, mask=live, other=0).to(tl.int64)
        for ahead in tl.static_range(taps):
            there = live & (step + ahead < L)
            target = tokens_of(index, k, step + ahead, there, L, ORDERED, WIDE)
            w = tl.load(weight + (k * taps + taps - 1 - ahead) * d + channels, mask=valid, other=0.0)
            at = target[:, None] * d + channels[None, :]
            g += w[None, :] * tl.load(
                dpre + (k * batch + b) * L * d + at, mask=there[:, None] & valid[None, :], other=0.0
            ).to(tl.float32)
    tl.store(dx + at_dx, g.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def gate_forward(total, z, out, elements, W: tl.constexpr):
    """out = SiLU(z) * total, of ``elements`` each."""
    i = tl.program_id(0).to(tl.int64) * W + tl.arange(0, W)
    mask = i < elements
    gate = tl.load(z + i, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(total + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + i, (x * gate * tl.sigmoid(gate)).to(out.dtype.element_ty), mask=mask)


@triton.jit
def gate_backward(total, z, dout, dtotal, dz, elements, W: tl.constexpr):
    """The gradients of ``total`` and ``z``."""
    i = tl.program_id(0).to(tl.int64) * W + tl.arange(0, W)
    mask = i < elements
    gate = tl.load(z + i, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(total + i, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(dout + i, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    tl.store(dtotal + i, (g * gate * s).to(dtotal.dtype.element_ty), mask=mask)
    tl.store(dz + i, (g * x * s * (1.0 + gate * (1.0 - s))).to(dz.dtype.element_ty), mask=mask)
