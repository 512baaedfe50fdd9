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
The scan's kernels of the ``triton`` engine. A program is one warp that walks a chunk of T steps, step by step, for W
channels, with N states of each in registers: parallel over chunks, channels and states, the recurrence needs no scan
across lanes, whose shuffles would outnumber the exponentials.

Names: R rows (order x batch), L tokens, d channels, g groups of B and C, n states, K orders. ``index`` (K, L) is the
token at each step of an order; without ``ORDERED`` the order is the raster's. Arrays are contiguous, but for the rows
of B and C: a group's is as long as the tensor that it lies in has columns. P steps are a piece of a chunk: a walk loads
what it takes of them while it walks the piece before; the last pass of the backward keeps their states instead. A2 is A
* log2(e), (K, n, d). u, delta, z, B, C, y, du, ddelta, dz come in any floating dtype, all else in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import place, tokens_of

__all__ = ["chunk_carries", "chunk_ends", "chunk_scan", "scan_apply", "scan_gradients"]

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _softplus(x):
    """max(x, 0) + log1p(e), e = exp(-|x|); log1p(e) / e as a minimax polynomial, itself off by 4e-8 at most."""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    p = -0.03006636 + e * 0.00536496
    p = 0.0792055 + e * p
    p = -0.13753888 + e * p
    p = 0.19153698 + e * p
    p = -0.24857175 + e * p
    p = 0.33321324 + e * p
    p = -0.49999648 + e * p
    return tl.maximum(x, 0.0) + e * (1.0 + e * p)


@triton.jit
def _after(a1, b1, a2, b2):
    """h -> a1 h + b1, then h -> a2 h + b2."""
    return a2 * a1, a2 * b1 + b2


@triton.jit
def _channels(channels, COUNT: tl.constexpr):
    """
    The channels of a tile of states by channels, as if they began at a multiple of COUNT and no more (which they must).
    To load a tile fast, Triton would give each lane four channels and few states. With 1, a lane has one channel and
    all states, and no sum over them crosses lanes; 2 is between, for sums both ways.
    """
    return tl.multiple_of(channels[None, :], [1, COUNT])


@triton.jit
def _step_size(delta, bias, SOFTPLUS: tl.constexpr):
    dt = delta.to(tl.float32) + bias
    if SOFTPLUS:
        dt = _softplus(dt)
    return dt


@triton.jit
def _taken(one, two, three, index, k, step, channels, valid, L, d, ORDERED: tl.constexpr, WIDE: tl.constexpr):
    """The token at a step, and what three tensors hold there; the same one twice costs nothing."""
    token = tokens_of(index, k, step, True, L, ORDERED, WIDE)
    at = token * d + channels
    return (
        token,
        tl.load(one + at, mask=valid, other=0.0),
        tl.load(two + at, mask=valid, other=0.0),
        tl.load(three + at, mask=valid, other=0.0),
    )


@triton.jit
def _stepped(state, a, shift, live, delta, x, b, SOFTPLUS: tl.constexpr):
    """The state after a step, the step sizes and u. Beyond the end (not ``live``) the state stays."""
    dt = tl.where(live, _step_size(delta, shift, SOFTPLUS), 0.0)
    x = tl.where(live, x.to(tl.float32), 0.0)
    return tl.exp2(a * dt[None, :]) * state + (dt * x)[None, :] * b.to(tl.float32)[:, None], dt, x


@triton.jit
def chunk_ends(
    u, delta, bias, A2, B, index, starts, sums, batch, L, d, g, chunks, n: tl.constexpr, b_columns: tl.constexpr,
    SOFTPLUS: tl.constexpr, ORDERED: tl.constexpr, WIDE: tl.constexpr, T: tl.constexpr, P: tl.constexpr,
    N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """
    First pass: each chunk's end state if it begins at zero, in the place of the next chunk's start (R, chunks + 1, n,
    d), and its sum of dt (R, chunks, d).
    """
    chunk, r, group, channels, valid = place(d, g, chunks, W)
    k = r // batch
    first = chunk.to(tl.int32) * T
    end = tl.minimum(first + T, L)
    u += r * L * d
    delta += r * L * d
    B += (r * L * g + group) * b_columns
    shift = tl.load(bias + k * d + channels, mask=valid, other=0.0)
    for some in range(0, n, N):
        s = some + tl.arange(0, N)
        there = (s < n)[:, None] & valid[None, :]
        a = tl.load(A2 + (k * n + s)[:, None] * d + _channels(channels, 1), mask=there, other=0.0)
        state = tl.zeros((N, W), dtype=tl.float32)
        total = tl.zeros((W,), dtype=tl.float32)
        ahead = ()
        for i in tl.static_range(P):
            ahead += (
                _taken(delta, u, u, index, k, tl.minimum(first + i, end - 1), channels, valid, L, d, ORDERED, WIDE),
            )
        for piece in range(first, end, P):
            here, ahead, rows = ahead, (), ()
            for i in tl.static_range(P):
                step = tl.minimum(piece + P + i, end - 1)
                ahead += (_taken(delta, u, u, index, k, step, channels, valid, L, d, ORDERED, WIDE),)
                rows += (tl.load(B + here[i][0] * (g * b_columns) + s, mask=s < n, other=0.0),)
            for i in tl.static_range(P):
                _, raw, x, _ = here[i]
                state, dt, _ = _stepped(state, a, shift, piece + i < end, raw, x, rows[i], SOFTPLUS)
                total += dt
        at_end = ((r * (chunks + 1) + chunk + 1) * n + s)[:, None] * d
        tl.store(starts + at_end + _channels(channels, 1), state, mask=there)
        tl.store(sums + (r * chunks + chunk) * d + channels, total, mask=valid)


@triton.jit
def chunk_scan(A2, sums, states, batch, d, n, chunks, BACK: tl.constexpr, T: tl.constexpr, W: tl.constexpr):
    """
    Second pass, in place (R, chunks + 1, n, d): from the chunks' own end states to the state at each chunk's start, and
    after the last; with ``BACK`` from the gradients of their starts to that of the state at each chunk's end, where the
    next one starts. T counts chunks.
    """
    programs = tl.cdiv(n * d, W)
    r = (tl.program_id(0) // programs).to(tl.int64)
    k = r // batch
    element = tl.program_id(0) % programs * W + tl.arange(0, W)  # of (n, d)
    valid = element < n * d
    a = tl.load(A2 + k * n * d + element, mask=valid, other=0.0)
    state = tl.zeros((W,), dtype=tl.float32)
    row = tl.arange(0, T)
    begin = chunks if BACK else 0
    tl.store(states + (r * (chunks + 1) + begin) * n * d + element, state, mask=valid)
    for past in range(0, chunks, T):
        step = past + row.to(tl.int64)
        mask = (step < chunks)[:, None] & valid[None, :]
        chunk = chunks - 1 - step if BACK else step
        at = (r * (chunks + 1) + (chunk if BACK else chunk + 1))[:, None] * n * d + element[None, :]
        total = tl.load(sums + (r * chunks + chunk)[:, None] * d + (element % d)[None, :], mask=mask, other=0.0)
        own = tl.load(states + at, mask=mask, other=0.0)
        decay = tl.exp2(a[None, :] * total)
        own += tl.where((row == 0)[:, None], decay * state[None, :], 0.0)
        _, own = tl.associative_scan((decay, own), 0, _after)
        tl.debug_barrier()  # of few chunks several lanes hold one
        tl.store(states + at, own, mask=mask)
        state = tl.sum(tl.where((row == T - 1)[:, None], own, 0.0), axis=0)


@triton.jit
def scan_apply(
    u, delta, bias, A2, B, C, D, z, index, starts, total, y, batch, L, d, g, chunks, n: tl.constexpr,
    b_columns: tl.constexpr, c_columns: tl.constexpr, SOFTPLUS: tl.constexpr, GATED: tl.constexpr,
    ORDERED: tl.constexpr, WIDE: tl.constexpr, T: tl.constexpr, P: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """
    Third pass: y (R, L, d), from the chunks' starts. Where there are more than N states, the sums over them are
    collected in ``total`` (R, L, d), float32.
    """
    chunk, r, group, channels, valid = place(d, g, chunks, W)
    k = r // batch
    first = chunk.to(tl.int32) * T
    end = tl.minimum(first + T, L)
    row = r * L * d
    u += row
    delta += row
    gates = z + row if GATED else u
    B += (r * L * g + group) * b_columns
    C += (r * L * g + group) * c_columns
    shift = tl.load(bias + k * d + channels, mask=valid, other=0.0)
    skip = tl.load(D + k * d + channels, mask=valid, other=0.0)
    for some in range(0, n, N):
        s = some + tl.arange(0, N)
        there = (s < n)[:, None] & valid[None, :]
        a = tl.load(A2 + (k * n + s)[:, None] * d + _channels(channels, 1), mask=there, other=0.0)
        at_chunk = ((r * (chunks + 1) + chunk) * n + s)[:, None] * d
        state = tl.load(starts + at_chunk + _channels(channels, 1), mask=there, other=0.0)
        ahead = ()
        for i in tl.static_range(P):
            ahead += (
                _taken(delta, u, gates, index, k, tl.minimum(first + i, end - 1), channels, valid, L, d, ORDERED, WIDE),
            )
        for piece in range(first, end, P):
            here, ahead = ahead, ()
            for i in tl.static_range(P):
                step = tl.minimum(piece + P + i, end - 1)
                ahead += (_taken(delta, u, gates, index, k, step, channels, valid, L, d, ORDERED, WIDE),)
            next_b = tl.load(B + here[0][0] * (g * b_columns) + s, mask=s < n, other=0.0)
            next_c = tl.load(C + here[0][0] * (g * c_columns) + s, mask=s < n, other=0.0)
            for i in tl.static_range(P):
                token, raw, x, gate = here[i]
                b, c = next_b, next_c
                if i + 1 < P:
                    next_b = tl.load(B + here[i + 1][0] * (g * b_columns) + s, mask=s < n, other=0.0)
                    next_c = tl.load(C + here[i + 1][0] * (g * c_columns) + s, mask=s < n, other=0.0)
                at, mask = token * d + channels, valid & (piece + i < end)
                state, _, x = _stepped(state, a, shift, piece + i < end, raw, x, b, SOFTPLUS)
                out = tl.sum(state * c.to(tl.float32)[:, None], axis=0)
                if n > N:
                    out += tl.load(total + row + at, mask=mask & (some > 0), other=0.0)
                    tl.store(total + row + at, out, mask=mask)  # each lane for itself
                out += skip * x
                if GATED:
                    gate = gate.to(tl.float32)
                    out *= gate * tl.sigmoid(gate)
                tl.store(y + row + at, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _before_gate(g, gate, GATED: tl.constexpr):
    """The gradient of the output before the gate, from that behind it."""
    g = g.to(tl.float32)
    if GATED:
        gate = gate.to(tl.float32)
        g *= gate * tl.sigmoid(gate)
    return g


@triton.jit
def chunk_carries(
    delta, bias, A2, C, z, index, dy, gradients, sums, batch, dy_rows, L, d, g, chunks, n: tl.constexpr,
    c_columns: tl.constexpr, SOFTPLUS: tl.constexpr, GATED: tl.constexpr, ORDERED: tl.constexpr, WIDE: tl.constexpr,
    T: tl.constexpr, P: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """
    First pass of the backward: the gradient of each chunk's start by the chunk's own outputs (R, chunks + 1, n, d), and
    its sum of dt (R, chunks, d).
    """
    chunk, r, group, channels, valid = place(d, g, chunks, W)
    k = r // batch
    first = chunk.to(tl.int32) * T
    end = tl.minimum(first + T, L)
    delta += r * L * d
    dy += r % dy_rows * L * d
    gates = z + r * L * d if GATED else dy
    C += (r * L * g + group) * c_columns
    shift = tl.load(bias + k * d + channels, mask=valid, other=0.0)
    for some in range(0, n, N):
        s = some + tl.arange(0, N)
        there = (s < n)[:, None] & valid[None, :]
        a = tl.load(A2 + (k * n + s)[:, None] * d + _channels(channels, 1), mask=there, other=0.0)
        carry = tl.zeros((N, W), dtype=tl.float32)
        total = tl.zeros((W,), dtype=tl.float32)
        ahead = ()
        for i in tl.static_range(P):
            step = tl.maximum(end - 1 - i, first)
            ahead += (_taken(delta, dy, gates, index, k, step, channels, valid, L, d, ORDERED, WIDE),)
        for past in range(0, end - first, P):
            here, ahead, rows = ahead, (), ()
            for i in tl.static_range(P):
                step = tl.maximum(end - 1 - past - P - i, first)
                ahead += (_taken(delta, dy, gates, index, k, step, channels, valid, L, d, ORDERED, WIDE),)
                rows += (tl.load(C + here[i][0] * (g * c_columns) + s, mask=s < n, other=0.0),)
            for i in tl.static_range(P):
                _, raw, g_y, gate = here[i]
                live = past + i < end - first
                dt = tl.where(live, _step_size(raw, shift, SOFTPLUS), 0.0)
                g_y = tl.where(live, _before_gate(g_y, gate, GATED), 0.0)
                carry = tl.exp2(a * dt[None, :]) * (carry + g_y[None, :] * rows[i].to(tl.float32)[:, None])
                total += dt
        at_start = ((r * (chunks + 1) + chunk) * n + s)[:, None] * d
        tl.store(gradients + at_start + _channels(channels, 1), carry, mask=there)
        tl.store(sums + (r * chunks + chunk) * d + channels, total, mask=valid)


@triton.jit
def _gradients_of(
    item,
    u, delta, bias, A2, B, C, D, z, index, starts, dy, gradients, pieces, total, du, ddelta, dz, dB, dC, dD,
    batch, dy_rows, R, L, d, g, chunks, parts, blocks, n: tl.constexpr, b_columns: tl.constexpr,
    c_columns: tl.constexpr, SOFTPLUS: tl.constexpr, GATED: tl.constexpr, ORDERED: tl.constexpr, WIDE: tl.constexpr,
    T: tl.constexpr, P: tl.constexpr, COUNT: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Of an item of :py:func:`scan_gradients`: a chunk of a row, a group, and a part of its channels."""
    part, group = (item % parts).to(tl.int64), item // parts % g
    chunk, r = (item // (parts * g) % chunks).to(tl.int64), (item // (parts * g * chunks)).to(tl.int64)
    k = r // batch
    row, row_dy = r * L * d, r % dy_rows * L * d
    sum_x, sum_dt, sum_out = total + 3 * r * L * d, total + (3 * r + 1) * L * d, total + (3 * r + 2) * L * d
    u += row
    delta += row
    dy += row_dy
    gates = z + row if GATED else dy
    B += (r * L * g + group) * b_columns
    C += (r * L * g + group) * c_columns
    dB += ((part * R + r) * L * g + group) * n
    dC += ((part * R + r) * L * g + group) * n
    first = chunk.to(tl.int32) * T
    end = tl.minimum(first + T, L)
    for block in range(blocks):
        channels_of_block = group * (d // g) + (part.to(tl.int32) * blocks + block) * W
        channels = channels_of_block + tl.arange(0, W)
        valid = channels < (group + 1) * (d // g)
        shift = tl.load(bias + k * d + channels, mask=valid, other=0.0)
        skip = tl.load(D + k * d + channels, mask=valid, other=0.0)
        for some in range(0, n, N):
            s = some + tl.arange(0, N)
            there = (s < n)[:, None] & valid[None, :]
            own = tl.arange(0, N)[:, None] * W + (_channels(channels, COUNT) - channels_of_block)
            kept = pieces + own
            a = tl.load(A2 + (k * n + s)[:, None] * d + _channels(channels, COUNT), mask=there, other=0.0)
            at_start = ((r * (chunks + 1) + chunk) * n + s)[:, None] * d + _channels(channels, COUNT)
            at_end = at_start + n * d
            state = tl.load(starts + at_start, mask=there, other=0.0)
            g_state = tl.load(gradients + at_end, mask=there, other=0.0)
            g_a = tl.zeros((N, W), dtype=tl.float32)
            g_skip = tl.zeros((W,), dtype=tl.float32)
            tl.store(kept, state)
            for following in range(1, tl.cdiv(end - first, P)):
                begin = first + (following - 1) * P
                here, rows = (), ()
                for i in tl.static_range(P):
                    taken = _taken(delta, u, u, index, k, begin + i, channels, valid, L, d, ORDERED, WIDE)
                    here += (taken,)
                    rows += (tl.load(B + taken[0] * (g * b_columns) + s, mask=s < n, other=0.0),)
                for i in tl.static_range(P):  # all of them, since pieces before the last are whole
                    _, raw, x, _ = here[i]
                    state, _, _ = _stepped(state, a, shift, True, raw, x, rows[i], SOFTPLUS)
                tl.store(kept + following * (N * W), state)
            tl.debug_barrier()  # of few states several lanes hold one
            last = tl.cdiv(end - first, P) - 1
            for past in range(last + 1):
                piece = last - past
                state = tl.load(kept + piece * (N * W))
                begin = first + piece * P
                here, behind, states, dts = (), (), (state,), ()
                for i in tl.static_range(P):
                    taken = _taken(
                        delta, u, gates, index, k, tl.minimum(begin + i, end - 1), channels, valid, L, d, ORDERED, WIDE
                    )
                    here += (taken,)
                    g_y = tl.load(dy + taken[0] * d + channels, mask=valid, other=0.0)
                    b = tl.load(B + taken[0] * (g * b_columns) + s, mask=s < n, other=0.0)
                    c = tl.load(C + taken[0] * (g * c_columns) + s, mask=s < n, other=0.0)
                    behind += ((g_y, b, c),)
                for i in tl.static_range(P):
                    _, raw, x, _ = here[i]
                    state, dt, _ = _stepped(state, a, shift, begin + i < end, raw, x, behind[i][1], SOFTPLUS)
                    states, dts = states + (state,), dts + (dt,)
                for i in tl.static_range(P):
                    live = begin + P - 1 - i < end
                    token, raw, x, gate = here[P - 1 - i]
                    g_out, b, c = behind[P - 1 - i]
                    at = token * d + channels
                    mask, mask_s = valid & live, (s < n) & live
                    dt, x, b, c = dts[P - 1 - i], x.to(tl.float32), b.to(tl.float32), c.to(tl.float32)
                    decay = tl.exp2(a * dt[None, :])
                    g_y = tl.where(live, _before_gate(g_out, gate, GATED), 0.0)
                    g_state += g_y[None, :] * c[:, None]
                    g_b = tl.sum(g_state * (dt * x)[None, :], axis=1)
                    g_c = tl.sum(states[P - i] * g_y[None, :], axis=1)
                    at_s = token * (g * n) + s
                    g_b += tl.load(dB + at_s, mask=mask_s & (block > 0), other=0.0)
                    g_c += tl.load(dC + at_s, mask=mask_s & (block > 0), other=0.0)
                    tl.store(dB + at_s, g_b, mask=mask_s)
                    tl.store(dC + at_s, g_c, mask=mask_s)
                    g_x = tl.sum(g_state * b[:, None], axis=0)
                    g_decay = g_state * (decay * states[P - 1 - i])  # the decay's gradient times the decay
                    g_dt = tl.sum(g_decay * a, axis=0)
                    g_a += g_decay * dt[None, :]
                    g_state *= decay
                    if n > N:
                        more = mask & (some > 0)
                        g_x += tl.load(sum_x + at, mask=more, other=0.0)
                        g_dt += tl.load(sum_dt + at, mask=more, other=0.0)
                        tl.store(sum_x + at, g_x, mask=mask)
                        tl.store(sum_dt + at, g_dt, mask=mask)
                    g_skip += g_y * x
                    g_dt = g_dt * LN2 + g_x * x
                    if SOFTPLUS:
                        g_dt *= tl.sigmoid(raw.to(tl.float32) + shift)
                    tl.store(ddelta + row + at, g_dt.to(ddelta.dtype.element_ty), mask=mask)
                    tl.store(du + row + at, (g_x * dt + skip * g_y).to(du.dtype.element_ty), mask=mask)
                    if GATED:
                        out = tl.sum(states[P - i] * c[:, None], axis=0)
                        if n > N:
                            out += tl.load(sum_out + at, mask=mask & (some > 0), other=0.0)
                            tl.store(sum_out + at, out, mask=mask)
                        out += skip * x
                        gate = gate.to(tl.float32)
                        slope = tl.sigmoid(gate)
                        slope *= 1.0 + gate * (1.0 - slope)
                        tl.store(dz + row + at, (g_out.to(tl.float32) * out * slope).to(dz.dtype.element_ty), mask=mask)
            tl.store(gradients + at_end, g_a, mask=there)
            tl.store(dD + (r * chunks + chunk) * d + channels, g_skip, mask=valid)
            tl.debug_barrier()  # the next states and the next block add to what these have written


# Compiled once for all sizes but those that vectors of channels and states follow: it takes seconds.
@triton.jit(do_not_specialize=["batch", "dy_rows", "R", "L", "chunks", "parts", "blocks"])
def scan_gradients(
    u, delta, bias, A2, B, C, D, z, index, starts, dy, gradients, pieces, total, du, ddelta, dz, dB, dC, dD,
    batch, dy_rows, R, L, d, g, chunks, parts, blocks, n: tl.constexpr, b_columns: tl.constexpr,
    c_columns: tl.constexpr, SOFTPLUS: tl.constexpr, GATED: tl.constexpr, ORDERED: tl.constexpr, WIDE: tl.constexpr,
    T: tl.constexpr, P: tl.constexpr, COUNT: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """
    Third pass: du, ddelta, dz (R, L, d); sums over channels dB, dC (parts, R, L, g, n); each chunk's part of dD (R,
    chunks, d), and of dA in the place of ``gradients`` (R, chunks + 1, n, d), from the second on. The chunk is walked
    forward for the states at which its pieces of P steps begin, kept in ``pieces`` (programs, T / P, N, W), float32;
    then, from the last piece to the first, each forward for its states and back for the gradients. No atomics: an
    item, one of R * chunks * g * parts, goes through the ``blocks`` channel blocks of its part one after the other.
    The grid is as large as there are pieces: a program takes one item after the other. Where there are more than N
    states, the sums over them are collected in ``total`` (R, 3, L, d), float32.
    """
    pieces += tl.program_id(0).to(tl.int64) * (T // P * N * W)
    for item in range(tl.program_id(0), R * chunks * g * parts, tl.num_programs(0)):
        _gradients_of(
            item, u, delta, bias, A2, B, C, D, z, index, starts, dy, gradients, pieces, total, du, ddelta, dz, dB, dC,
            dD, batch, dy_rows, R, L, d, g, chunks, parts, blocks, n, b_columns, c_columns, SOFTPLUS, GATED, ORDERED,
            WIDE, T, P, COUNT, N, W,
        )  # fmt: skip
