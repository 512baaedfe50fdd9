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
The kernels of the ``triton`` engine. A program holds a tile of T steps (a chunk) by W channels and goes through the
states one by one, so that every load is a tile of tokens and the recurrence a scan along the tile.

Names: R rows (order x batch), L tokens, d channels, g groups of B and C, n states, K orders, taps of a convolution.
``index`` (K, L) is the token at each step of an order, ``inverse`` (K, L) the step of each token; without ``ORDERED``
the order is the raster's. Arrays are contiguous, but for the rows of B and C: their ``token`` stride is the number of
columns of the tensor that they lie in. A2 is A * log2(e), (K, n, d).
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["chunk_carries", "chunk_ends", "chunk_gradients", "chunk_starts", "conv_backward_input"]
__all__ += ["conv_backward_pre", "conv_forward", "gate_backward", "gate_forward", "scan_apply", "scan_gradients"]

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _softplus(x):
    """max(x, 0) + log1p(exp(-|x|)), the logarithm as 2 artanh(e / (2 + e))."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    q = s * s
    p = 1.0 / 13.0 + q * (1.0 / 15.0)
    p = 1.0 / 11.0 + q * p
    p = 1.0 / 9.0 + q * p
    p = 1.0 / 7.0 + q * p
    p = 1.0 / 5.0 + q * p
    p = 1.0 / 3.0 + q * p
    return tl.maximum(x, 0.0) + 2.0 * (s + s * (q * p))


@triton.jit
def _after(a1, b1, a2, b2):
    """h -> a1 h + b1, then h -> a2 h + b2."""
    return a2 * a1, a2 * b1 + b2


@triton.jit
def _after_keeping(a1, b1, p1, a2, b2, p2):
    """As ``_after``; p is what a state has from the one before it, which ``state - input`` would round away."""
    return a2 * a1, a2 * b1 + b2, a2 * b1 + p2


@triton.jit
def _rest(s1, e1, s2, e2):
    """On the walk back, the sum, and the sum without the first, which ``sum - first`` would round away."""
    return s1 + s2, s1 + e2


@triton.jit
def _before(a1, b1, c1, a2, b2, c2):
    """
    Segments of the walk back, the right one (1) met first. A segment maps the gradient that enters it, times the decay
    that follows it, to the gradient a x + b of its first state; c is its first decay. So no division, nor a shift.
    """
    a = a2 * c1
    return a * a1, a * b1 + b2, c2


@triton.jit
def _place(d, g, chunks, W: tl.constexpr):
    """What a program of the grid (R * chunks * channel blocks,) is for: chunk, row, group, channels."""
    blocks_of_group = tl.cdiv(d // g, W)
    blocks = blocks_of_group * g
    program = tl.program_id(0)
    r, chunk, block = program // (blocks * chunks), program // blocks % chunks, program % blocks
    group = block // blocks_of_group
    channels = group * (d // g) + block % blocks_of_group * W + tl.arange(0, W)
    return chunk.to(tl.int64), r.to(tl.int64), group, channels, channels < (group + 1) * (d // g)


@triton.jit
def _tokens(index, k, chunk, L, ORDERED: tl.constexpr, WIDE: tl.constexpr, T: tl.constexpr):
    """The tokens of a tile. Offsets within a row are 64 bits wide only where they must be: they take registers."""
    steps = chunk * T + tl.arange(0, T)
    live = steps < L
    token = steps
    if ORDERED:
        token = tl.load(index + k * L + steps, mask=live, other=0)
    return token.to(tl.int64 if WIDE else tl.int32), live


@triton.jit
def _step_sizes(delta, bias, at, mask, k, d, channels, valid, SOFTPLUS: tl.constexpr):
    """The step sizes of a tile, zero beyond its ends, and what softplus took."""
    raw = tl.load(delta + at, mask=mask, other=0.0).to(tl.float32)
    raw += tl.load(bias + k * d + channels, mask=valid, other=0.0)[None, :]
    dt = raw
    if SOFTPLUS:
        dt = _softplus(raw)
    return tl.where(mask, dt, 0.0), raw


@triton.jit
def chunk_ends(
    u, delta, bias, A2, B, index, ends, sums, batch, L, d, g, n, chunks, b_columns,
    SOFTPLUS: tl.constexpr, ORDERED: tl.constexpr, WIDE: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """First pass: each chunk's end state (R, chunks, n, d) if it begins at zero, and sum of dt (R, chunks, d)."""
    chunk, r, group, channels, valid = _place(d, g, chunks, W)
    k = r // batch
    token, live = _tokens(index, k, chunk, L, ORDERED, WIDE, T)
    mask = live[:, None] & valid[None, :]
    at = token[:, None] * d + channels[None, :]
    dt, _ = _step_sizes(delta + r * L * d, bias, at, mask, k, d, channels, valid, SOFTPLUS)
    x = dt * tl.load(u + r * L * d + at, mask=mask, other=0.0).to(tl.float32)
    _, rest = tl.associative_scan((dt, tl.zeros((T, W), dtype=tl.float32)), 0, _rest, reverse=True)
    tl.store(sums + (r * chunks + chunk) * d + channels, tl.sum(dt, axis=0), mask=valid)
    rows = B + (r * L * g + group) * b_columns + token * (g * b_columns)
    for s in range(n):
        a = tl.load(A2 + (k * n + s) * d + channels, mask=valid, other=0.0)
        b = tl.load(rows + s, mask=live, other=0.0).to(tl.float32)
        end = tl.sum(tl.exp2(a[None, :] * rest) * (x * b[:, None]), axis=0)
        tl.store(ends + ((r * chunks + chunk) * n + s) * d + channels, end, mask=valid)


@triton.jit
def chunk_starts(A2, ends, sums, starts, batch, d, n, chunks, T: tl.constexpr, W: tl.constexpr):
    """Second pass: the state at each chunk's start, and after the last, (R, chunks + 1, n, d). T counts chunks."""
    programs = tl.cdiv(n * d, W)
    r = (tl.program_id(0) // programs).to(tl.int64)
    k = r // batch
    element = tl.program_id(0) % programs * W + tl.arange(0, W)  # of (n, d)
    valid = element < n * d
    a = tl.load(A2 + k * n * d + element, mask=valid, other=0.0)
    state = tl.zeros((W,), dtype=tl.float32)
    row = tl.arange(0, T)
    tl.store(starts + r * (chunks + 1) * n * d + element, state, mask=valid)
    for first in range(0, chunks, T):
        chunk = first + row.to(tl.int64)
        mask = (chunk < chunks)[:, None] & valid[None, :]
        total = tl.load(sums + (r * chunks + chunk)[:, None] * d + (element % d)[None, :], mask=mask, other=0.0)
        end = tl.load(ends + (r * chunks + chunk)[:, None] * n * d + element[None, :], mask=mask, other=0.0)
        decay = tl.exp2(a[None, :] * total)
        end += tl.where((row == 0)[:, None], decay * state[None, :], 0.0)
        _, end = tl.associative_scan((decay, end), 0, _after)
        at = (r * (chunks + 1) + chunk + 1)[:, None] * n * d + element[None, :]
        tl.store(starts + at, end, mask=mask)
        state = tl.sum(tl.where((row == T - 1)[:, None], end, 0.0), axis=0)


@triton.jit
def scan_apply(
    u, delta, bias, A2, B, C, D, z, index, starts, y, batch, L, d, g, n, chunks, b_columns, c_columns,
    SOFTPLUS: tl.constexpr, GATED: tl.constexpr, ORDERED: tl.constexpr, WIDE: tl.constexpr,
    T: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Third pass: y (R, L, d), from the chunks' starts."""
    chunk, r, group, channels, valid = _place(d, g, chunks, W)
    k = r // batch
    token, live = _tokens(index, k, chunk, L, ORDERED, WIDE, T)
    mask = live[:, None] & valid[None, :]
    at = token[:, None] * d + channels[None, :]
    dt, _ = _step_sizes(delta + r * L * d, bias, at, mask, k, d, channels, valid, SOFTPLUS)
    x = tl.load(u + r * L * d + at, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(D + k * d + channels, mask=valid, other=0.0)[None, :] * x
    x *= dt
    first = (tl.arange(0, T) == 0)[:, None]
    rows_b = B + (r * L * g + group) * b_columns + token * (g * b_columns)
    rows_c = C + (r * L * g + group) * c_columns + token * (g * c_columns)
    for s in range(n):
        a = tl.load(A2 + (k * n + s) * d + channels, mask=valid, other=0.0)
        start = tl.load(starts + ((r * (chunks + 1) + chunk) * n + s) * d + channels, mask=valid, other=0.0)
        b = tl.load(rows_b + s, mask=live, other=0.0).to(tl.float32)
        c = tl.load(rows_c + s, mask=live, other=0.0).to(tl.float32)
        decay = tl.exp2(a[None, :] * dt)
        h = x * b[:, None] + tl.where(first, decay * start[None, :], 0.0)
        _, h = tl.associative_scan((decay, h), 0, _after)
        out += h * c[:, None]
    if GATED:
        gate = tl.load(z + r * L * d + at, mask=mask, other=0.0).to(tl.float32)
        out *= gate * tl.sigmoid(gate)
    tl.store(y + r * L * d + at, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _output_gradient(dy, z, at, mask, GATED: tl.constexpr):
    """The gradient of the output before the gate."""
    g = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
        g *= gate * tl.sigmoid(gate)
    return g


@triton.jit
def chunk_carries(
    delta, bias, A2, C, z, index, dy, carries, batch, dy_rows, L, d, g, n, chunks, c_columns,
    SOFTPLUS: tl.constexpr, GATED: tl.constexpr, ORDERED: tl.constexpr, WIDE: tl.constexpr,
    T: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """First pass of the backward: the gradient of each chunk's start by the chunk's own outputs (R, chunks, n, d)."""
    chunk, r, group, channels, valid = _place(d, g, chunks, W)
    k = r // batch
    token, live = _tokens(index, k, chunk, L, ORDERED, WIDE, T)
    mask = live[:, None] & valid[None, :]
    at = token[:, None] * d + channels[None, :]
    dt, _ = _step_sizes(delta + r * L * d, bias, at, mask, k, d, channels, valid, SOFTPLUS)
    g_y = _output_gradient(dy + r % dy_rows * L * d, z + r * L * d, at, mask, GATED)
    passed = tl.cumsum(dt, axis=0)
    rows = C + (r * L * g + group) * c_columns + token * (g * c_columns)
    for s in range(n):
        a = tl.load(A2 + (k * n + s) * d + channels, mask=valid, other=0.0)
        c = tl.load(rows + s, mask=live, other=0.0).to(tl.float32)
        carry = tl.sum(tl.exp2(a[None, :] * passed) * (g_y * c[:, None]), axis=0)
        tl.store(carries + ((r * chunks + chunk) * n + s) * d + channels, carry, mask=valid)


@triton.jit
def chunk_gradients(A2, carries, sums, gradients, batch, d, n, chunks, T: tl.constexpr, W: tl.constexpr):
    """Second pass: the gradient of the state at each chunk's end (R, chunks, n, d). T counts chunks."""
    programs = tl.cdiv(n * d, W)
    r = (tl.program_id(0) // programs).to(tl.int64)
    k = r // batch
    element = tl.program_id(0) % programs * W + tl.arange(0, W)  # of (n, d)
    valid = element < n * d
    a = tl.load(A2 + k * n * d + element, mask=valid, other=0.0)
    gradient = tl.zeros((W,), dtype=tl.float32)
    row = tl.arange(0, T)
    tl.store(gradients + (r * chunks + chunks - 1) * n * d + element, gradient, mask=valid)
    for past in range(0, chunks, T):
        chunk = chunks - past - T + row.to(tl.int64)
        mask = (chunk >= 0)[:, None] & valid[None, :]
        total = tl.load(sums + (r * chunks + chunk)[:, None] * d + (element % d)[None, :], mask=mask, other=0.0)
        carry = tl.load(carries + (r * chunks + chunk)[:, None] * n * d + element[None, :], mask=mask, other=0.0)
        decay = tl.exp2(a[None, :] * total)
        carry += tl.where((row == T - 1)[:, None], decay * gradient[None, :], 0.0)
        _, carry = tl.associative_scan((decay, carry), 0, _after, reverse=True)
        at = (r * chunks + chunk - 1)[:, None] * n * d + element[None, :]
        tl.store(gradients + at, carry, mask=mask & (chunk > 0)[:, None])
        gradient = tl.sum(tl.where((row == 0)[:, None], carry, 0.0), axis=0)


@triton.jit
def scan_gradients(
    u, delta, bias, A2, B, C, D, z, index, starts, dy, gradients, du, ddelta, dz, dB, dC, dD,
    batch, dy_rows, R, L, d, g, n, chunks, b_columns, c_columns, parts, blocks,
    SOFTPLUS: tl.constexpr, GATED: tl.constexpr, ORDERED: tl.constexpr, WIDE: tl.constexpr,
    T: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """
    Third pass: du, ddelta, dz (R, L, d); sums over channels dB, dC (parts, R, L, g, n); each chunk's part of dD (R,
    chunks, d), and of dA in the place of ``gradients`` (R, chunks, n, d). No atomics: a program goes through the
    ``blocks`` channel blocks of its part one after the other. The grid is (R * chunks * g * parts,).
    """
    program = tl.program_id(0)
    part, group = (program % parts).to(tl.int64), program // parts % g
    chunk, r = (program // (parts * g) % chunks).to(tl.int64), (program // (parts * g * chunks)).to(tl.int64)
    k = r // batch
    row, row_dy = r * L * d, r % dy_rows * L * d
    token, live = _tokens(index, k, chunk, L, ORDERED, WIDE, T)
    first, last = (tl.arange(0, T) == 0)[:, None], (tl.arange(0, T) == T - 1)[:, None]
    rows_b = B + (r * L * g + group) * b_columns + token * (g * b_columns)
    rows_c = C + (r * L * g + group) * c_columns + token * (g * c_columns)
    rows_db = dB + ((part * R + r) * L * g + group) * n + token * (g * n)
    rows_dc = dC + ((part * R + r) * L * g + group) * n + token * (g * n)
    for block in range(blocks):
        channels = group * (d // g) + (part.to(tl.int32) * blocks + block) * W + tl.arange(0, W)
        valid = channels < (group + 1) * (d // g)
        mask = live[:, None] & valid[None, :]
        at = token[:, None] * d + channels[None, :]
        dt, raw = _step_sizes(delta + row, bias, at, mask, k, d, channels, valid, SOFTPLUS)
        u_ = tl.load(u + row + at, mask=mask, other=0.0).to(tl.float32)
        g_y = _output_gradient(dy + row_dy, z + row, at, mask, GATED)
        skip = tl.load(D + k * d + channels, mask=valid, other=0.0)[None, :]
        x = dt * u_
        out = skip * u_
        g_x = tl.zeros((T, W), dtype=tl.float32)
        g_dt = tl.zeros((T, W), dtype=tl.float32)
        for s in range(n):
            a = tl.load(A2 + (k * n + s) * d + channels, mask=valid, other=0.0)
            start = tl.load(starts + ((r * (chunks + 1) + chunk) * n + s) * d + channels, mask=valid, other=0.0)
            at_chunk = ((r * chunks + chunk) * n + s) * d + channels
            end = tl.load(gradients + at_chunk, mask=valid, other=0.0)
            b = tl.load(rows_b + s, mask=live, other=0.0).to(tl.float32)[:, None]
            c = tl.load(rows_c + s, mask=live, other=0.0).to(tl.float32)[:, None]
            decay = tl.exp2(a[None, :] * dt)
            kept = tl.where(first, decay * start[None, :], 0.0)
            _, h, kept = tl.associative_scan((decay, x * b + kept, kept), 0, _after_keeping)
            g_h = g_y * c + tl.where(last, end[None, :], 0.0)
            _, g_h, _ = tl.associative_scan((tl.full((T, W), 1.0, tl.float32), g_h, decay), 0, _before, reverse=True)
            if GATED:
                out += h * c
            db, dc = tl.sum(g_h * x, axis=1), tl.sum(g_y * h, axis=1)
            if block > 0:
                db += tl.load(rows_db + s, mask=live, other=0.0)
                dc += tl.load(rows_dc + s, mask=live, other=0.0)
            tl.store(rows_db + s, db, mask=live)
            tl.store(rows_dc + s, dc, mask=live)
            g_x += g_h * b
            g_decay = g_h * kept  # the decay's gradient times the decay
            g_dt += g_decay * a[None, :]
            tl.store(gradients + at_chunk, tl.sum(g_decay * dt, axis=0), mask=valid)
        g_dt = g_dt * LN2 + g_x * u_
        if SOFTPLUS:
            g_dt *= tl.sigmoid(raw)
        tl.store(ddelta + row + at, g_dt.to(ddelta.dtype.element_ty), mask=mask)
        tl.store(du + row + at, (g_x * dt + skip * g_y).to(du.dtype.element_ty), mask=mask)
        tl.store(dD + (r * chunks + chunk) * d + channels, tl.sum(g_y * u_, axis=0), mask=valid)
        if GATED:
            gate = tl.load(z + row + at, mask=mask, other=0.0).to(tl.float32)
            s_ = tl.sigmoid(gate)
            g_out = tl.load(dy + row_dy + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(dz + row + at, (g_out * out * s_ * (1.0 + gate * (1.0 - s_))).to(dz.dtype.element_ty), mask=mask)
        tl.debug_barrier()  # the next block adds to what this one has written


@triton.jit
def _convolved(
    xz, weight, bias, index, k, b, chunk, channels, valid, L, d, taps,
    ORDERED: tl.constexpr, WIDE: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The causal convolution of a tile of steps (T, W), before SiLU."""
    steps = chunk * T + tl.arange(0, T)
    x = tl.zeros((T, W), dtype=tl.float32)
    x += tl.load(bias + k * d + channels, mask=valid, other=0.0)[None, :]
    for back in range(taps):
        step = steps - back
        there = (step >= 0) & (step < L)
        token = step
        if ORDERED:
            token = tl.load(index + k * L + step, mask=there, other=0)
        token = token.to(tl.int64 if WIDE else tl.int32)
        w = tl.load(weight + (k * taps + taps - 1 - back) * d + channels, mask=valid, other=0.0)
        at = token[:, None] * (2 * d) + channels[None, :]
        x += w[None, :] * tl.load(xz + b * L * 2 * d + at, mask=there[:, None] & valid[None, :], other=0.0).to(
            tl.float32
        )
    return x


@triton.jit
def conv_forward(
    xz, weight, bias, index, u, batch, L, d, taps, chunks,
    ORDERED: tl.constexpr, WIDE: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """
    Causal depthwise convolution along each order and SiLU: xz (batch, L, 2 d), of which the first d channels are taken,
    weight (K, taps, d), bias (K, d) to u (K, batch, L, d). The grid is (K * batch * chunks * channel blocks,).
    """
    chunk, r, _, channels, valid = _place(d, 1, chunks, W)
    k, b = r // batch, r % batch
    x = _convolved(xz, weight, bias, index, k, b, chunk, channels, valid, L, d, taps, ORDERED, WIDE, T, W)
    token, live = _tokens(index, k, chunk, L, ORDERED, WIDE, T)
    at = token[:, None] * d + channels[None, :]
    tl.store(u + r * L * d + at, (x * tl.sigmoid(x)).to(u.dtype.element_ty), mask=live[:, None] & valid[None, :])


@triton.jit
def conv_backward_pre(
    xz, weight, bias, index, du, dweight, dbias, batch, L, d, taps, chunks,
    ORDERED: tl.constexpr, WIDE: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """
    First half of its backward: du (K, batch, L, d) becomes the gradient before SiLU, in place; each chunk's part of
    dweight (K, batch, chunks, taps, d) and dbias (K, batch, chunks, d). Grid as above.
    """
    chunk, r, _, channels, valid = _place(d, 1, chunks, W)
    k, b = r // batch, r % batch
    x = _convolved(xz, weight, bias, index, k, b, chunk, channels, valid, L, d, taps, ORDERED, WIDE, T, W)
    token, live = _tokens(index, k, chunk, L, ORDERED, WIDE, T)
    mask = live[:, None] & valid[None, :]
    at = token[:, None] * d + channels[None, :]
    s = tl.sigmoid(x)
    g = tl.load(du + r * L * d + at, mask=mask, other=0.0).to(tl.float32) * s * (1.0 + x * (1.0 - s))
    tl.store(du + r * L * d + at, g.to(du.dtype.element_ty), mask=mask)
    tl.store(dbias + (r * chunks + chunk) * d + channels, tl.sum(g, axis=0), mask=valid)
    steps = chunk * T + tl.arange(0, T)
    for back in range(taps):
        step = steps - back
        there = (step >= 0) & live
        source = step
        if ORDERED:
            source = tl.load(index + k * L + step, mask=there, other=0)
        source = source.to(tl.int64 if WIDE else tl.int32)
        at_source = source[:, None] * (2 * d) + channels[None, :]
        value = tl.load(xz + b * L * 2 * d + at_source, mask=there[:, None] & valid[None, :], other=0.0).to(tl.float32)
        at_weight = ((r * chunks + chunk) * taps + taps - 1 - back) * d + channels
        tl.store(dweight + at_weight, tl.sum(g * value, axis=0), mask=valid)


@triton.jit
def conv_backward_input(
    weight, index, inverse, dpre, dxz, batch, K, L, d, taps, chunks,
    ORDERED: tl.constexpr, WIDE: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """
    Second half: dpre (K, batch, L, d) to the first d channels of dxz (batch, L, 2 d). The grid is (batch * chunks of
    tokens * channel blocks,).
    """
    chunk, b, _, channels, valid = _place(d, 1, chunks, W)
    token = chunk * T + tl.arange(0, T)
    live = token < L
    x = tl.zeros((T, W), dtype=tl.float32)
    for k in range(K):
        step = token
        if ORDERED:
            step = tl.load(inverse + k * L + token, mask=live, other=0).to(tl.int64)
        for ahead in range(taps):
            there = live & (step + ahead < L)
            target = step + ahead
            if ORDERED:
                target = tl.load(index + k * L + step + ahead, mask=there, other=0)
            target = target.to(tl.int64 if WIDE else tl.int32)
            w = tl.load(weight + (k * taps + taps - 1 - ahead) * d + channels, mask=valid, other=0.0)
            at = target[:, None] * d + channels[None, :]
            x += w[None, :] * tl.load(
                dpre + (k * batch + b) * L * d + at, mask=there[:, None] & valid[None, :], other=0.0
            ).to(tl.float32)
    at = (b * L + token)[:, None] * (2 * d) + channels[None, :]
    tl.store(dxz + at, x.to(dxz.dtype.element_ty), mask=live[:, None] & valid[None, :])


@triton.jit
def gate_forward(xz, y, out, total, elements, K, d, W: tl.constexpr):
    """out = SiLU(z) * total, total = sum of y (K, batch, L, d) over the orders; ``elements`` is batch * L * d."""
    i = tl.program_id(0).to(tl.int64) * W + tl.arange(0, W)
    mask = i < elements
    x = tl.zeros((W,), dtype=tl.float32)
    at = i
    for _ in range(K):
        x += tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
        at += elements
    z = tl.load(xz + i // d * (2 * d) + d + i % d, mask=mask, other=0.0).to(tl.float32)
    tl.store(total + i, x.to(total.dtype.element_ty), mask=mask)
    tl.store(out + i, (x * z * tl.sigmoid(z)).to(out.dtype.element_ty), mask=mask)


@triton.jit
def gate_backward(xz, total, dout, dy, dxz, elements, d, W: tl.constexpr):
    """The gate's backward: dy (batch, L, d), and the last d channels of dxz (batch, L, 2 d)."""
    i = tl.program_id(0).to(tl.int64) * W + tl.arange(0, W)
    mask = i < elements
    at = i // d * (2 * d) + d + i % d
    z = tl.load(xz + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(dout + i, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(total + i, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(z)
    tl.store(dy + i, (g * z * s).to(dy.dtype.element_ty), mask=mask)
    tl.store(dxz + at, (g * x * s * (1.0 + z * (1.0 - s))).to(dxz.dtype.element_ty), mask=mask)
