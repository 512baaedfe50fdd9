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
The loops of the ``numba`` engine, on explicit SIMD lanes: LLVM's vectors of 16 floats, which it maps to whatever the
processor has (AVX-512, AVX2, NEON): the loop vectoriser would guard each of these short loops with alias checks.

Names: R rows (order x batch), L tokens, d channels, g groups of B and C, n states, K orders, W channels of a block,
``TOKENS`` tokens of a chunk. Arrays are C-contiguous float32; ``index`` (K, L), int32, is the token at each step of an
order, ``inverse`` (K, L) the step of each token. Every kernel handles a range of tasks and releases the GIL, so that
threads share the work. One file, since numba's cache on disk looks at no other for changes.
"""

from __future__ import annotations

import operator
from functools import cache

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

__all__ = ["LANES", "TOKENS", "conv_backward_input", "conv_backward_pre", "conv_forward", "gate_backward"]
__all__ += ["gate_forward", "scan_backward", "scan_forward"]

TOKENS = 64
LANES = 16
PAIR = 2 * LANES

f32 = np.float32
LN2, LOG2E = f32(0.6931471805599453), f32(1.4426950408889634)
# Taylor coefficients of 2^x about 0 up to x^6: relative error below 2e-7 on [-0.5, 0.5], exact at 0
E2, E3, E4, E5, E6 = (f32(np.log(2.0) ** i / np.prod(np.arange(1.0, i + 1))) for i in range(2, 7))

# No fastmath: it would also relax the one addition that must be exact; the lanes' operations carry their own flags.
_jit = numba.njit(nogil=True, cache=True, error_model="numpy")
_inline = numba.njit(inline="always", error_model="numpy")


class _Lanes(types.Type):
    """16 float32 values in a vector register."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


_lanes = _Lanes()
_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_BITS = ir.VectorType(ir.IntType(32), LANES)


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type) -> None:
        super().__init__(manager, fe_type, _VECTOR)


def _address(context, builder, array_type, array, offset):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), _VECTOR.as_pointer())


@intrinsic
def _load(typingctx, array, offset):
    """16 values of a float32 array from an element's flat offset on."""

    def codegen(context, builder, sig, args):
        return builder.load(_address(context, builder, sig.args[0], *args), align=4)

    return _lanes(array, types.int64), codegen


@intrinsic
def _store(typingctx, array, offset, value):
    """Write 16 values to a float32 array from an element's flat offset on."""

    def codegen(context, builder, sig, args):
        builder.store(args[2], _address(context, builder, sig.args[0], *args[:2]), align=4)
        return context.get_dummy_value()

    return types.void(array, types.int64, _lanes), codegen


@intrinsic
def _splat(typingctx, value):
    """The same value in every lane."""

    def codegen(context, builder, sig, args):
        one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), args[0], ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), ir.Constant(_BITS, [0] * LANES))

    return _lanes(types.float32), codegen


def _binary(name: str, flags: tuple[str, ...] = ("contract", "reassoc", "nsz", "arcp")):
    @intrinsic
    def operation(typingctx, a, b):
        def codegen(context, builder, sig, args):
            return getattr(builder, name)(*args, flags=flags)

        return _lanes(_lanes, _lanes), codegen

    return operation


def _extreme(comparison: str):
    @intrinsic
    def operation(typingctx, a, b):
        """The larger (or smaller) of two; where ``a`` is NaN, it stays."""

        def codegen(context, builder, sig, args):
            return builder.select(builder.fcmp_ordered(comparison, *args), args[1], args[0])

        return _lanes(_lanes, _lanes), codegen

    return operation


_add, _sub, _mul, _div = _binary("fadd"), _binary("fsub"), _binary("fmul"), _binary("fdiv")
_exact_add, _exact_sub = _binary("fadd", ()), _binary("fsub", ())
_maximum, _minimum = _extreme("<"), _extreme(">")


@intrinsic
def _scale(typingctx, value, exponents):
    """value * 2^k, where k is in the lowest bits of the mantissa of ``exponents``."""

    def codegen(context, builder, sig, args):
        bits = [builder.bitcast(x, _BITS) for x in args]
        shifted = builder.shl(bits[1], ir.Constant(_BITS, [23] * LANES))
        return builder.bitcast(builder.add(bits[0], shifted), _VECTOR)

    return _lanes(_lanes, _lanes), codegen


@intrinsic
def _sum_rows(typingctx, array, offset):
    """Lane i is the sum of row i of 16 rows of 16 values from an element's flat offset on: a tree of shuffles."""

    def codegen(context, builder, sig, args):
        pointer = _address(context, builder, sig.args[0], *args)
        rows = [builder.load(builder.gep(pointer, [ir.Constant(ir.IntType(32), i)]), align=4) for i in range(LANES)]
        half = LANES // 2
        while half:
            low = [2 * half * q + i + side for q in range(8 // half) for side in (0, LANES) for i in range(half)]
            masks = [ir.Constant(_BITS, [i + shift for i in low]) for shift in (0, half)]
            rows = [
                builder.fadd(*(builder.shuffle_vector(a, b, mask) for mask in masks))
                for a, b in zip(rows[:half], rows[half:])
            ]
            half //= 2
        return rows[0]

    return _lanes(array, types.int64), codegen


def _overload(symbol, operation):
    @overload(symbol, inline="always")
    def typed(a, b):
        if isinstance(a, _Lanes) and isinstance(b, _Lanes):
            return lambda a, b: operation(a, b)


_overload(operator.add, _add)
_overload(operator.sub, _sub)
_overload(operator.mul, _mul)
_overload(operator.truediv, _div)


@_inline
def _exp2_of_negative(x):
    """2^x for x <= 127: a polynomial on the fraction, the whole part added to the exponent; at least 2^-125."""
    x = _maximum(x, _splat(f32(-125.0)))
    shifted = _exact_add(x, _splat(f32(12582912.0)))  # 1.5 * 2^23: rounds x into the lowest bits of the mantissa
    x = x - _exact_sub(shifted, _splat(f32(12582912.0)))
    p = _splat(E5) + x * _splat(E6)
    p = _splat(E4) + x * p
    p = _splat(E3) + x * p
    p = _splat(E2) + x * p
    p = _splat(LN2) + x * p
    p = _splat(f32(1.0)) + x * p
    return _scale(p, shifted)


@_inline
def _exp2(x):
    """2^x, at least 2^-125 and at most 2^127."""
    return _exp2_of_negative(_minimum(x, _splat(f32(127.0))))


@_inline
def _sigmoid(x):
    one = _splat(f32(1.0))
    return one / (one + _exp2(x * _splat(-LOG2E)))


@_inline
def _softplus(x):
    """max(x, 0) + log1p(e), e = exp(-|x|), the logarithm as 2 artanh(e / (2 + e))."""
    zero = _splat(f32(0.0))
    e = _exp2_of_negative(_minimum(x, zero - x) * _splat(LOG2E))
    s = e / (_splat(f32(2.0)) + e)
    q = s * s
    p = _splat(f32(1.0 / 13.0)) + q * _splat(f32(1.0 / 15.0))
    p = _splat(f32(1.0 / 11.0)) + q * p
    p = _splat(f32(1.0 / 9.0)) + q * p
    p = _splat(f32(1.0 / 7.0)) + q * p
    p = _splat(f32(1.0 / 5.0)) + q * p
    p = _splat(f32(1.0 / 3.0)) + q * p
    s = s + s
    return _maximum(x, zero) + (s + s * (q * p))


@_inline
def _gather(source, at, w, target, row):
    """Copy ``w`` channels from a flat offset to the row of a block; lanes beyond stay."""
    W = target.shape[1]
    if w == W:
        for j in range(0, W, LANES):
            _store(target, row * W + j, _load(source, at + j))
    else:
        flat = source.ravel()
        for j in range(w):
            target[row, j] = flat[at + j]


@_inline
def _scatter(source, row, w, target, at):
    """Copy ``w`` channels from the row of a block to a flat offset."""
    W = source.shape[1]
    if w == W:
        for j in range(0, W, LANES):
            _store(target, at + j, _load(source, row * W + j))
    else:
        flat = target.ravel()
        for j in range(w):
            flat[at + j] = source[row, j]


@_inline
def _gather_delta(r, t, group, ch, w, rank, L, d, delta, B, raw, low, i):
    """Fetch what a token's step sizes are made from: themselves, or the low-rank form that lies before B."""
    if rank:
        for s in range(rank):
            low[i, s] = B[r, t, group, s]
    else:
        _gather(delta, (r * L + t) * d + ch, w, raw, i)


@_inline
def _raw_delta(i, j, W, rank, dt_weight, bias, raw, low):
    """16 step sizes of a token before softplus."""
    x = _load(bias, j)
    if rank:
        for s in range(rank):
            x = x + _splat(low[i, s]) * _load(dt_weight, s * W + j)
        return x
    return x + _load(raw, i * W + j)


@cache
def scan_forward(W: int, decaying: bool):
    """
    The forward scan over blocks of W channels, a multiple of 16; a task is (row, group, block). ``decaying`` promises
    that no delta * A is positive.
    """
    T = TOKENS

    @_jit
    def kernel(first, last, batch, u, delta, dt_weight, bias, softplus, A2, D, B, b0, C, c0, index, y, states, ends):
        L, d = u.shape[1:]
        groups, n = B.shape[2], A2.shape[1]
        rows = (n + LANES - 1) // LANES * LANES
        width = d // groups
        blocks = (width + W - 1) // W
        rank = dt_weight.shape[1]
        chunks = states.shape[1]
        a2, h, dtw = np.zeros((n, W), f32), np.empty((n, W), f32), np.zeros((rank, W), f32)
        bias_, skip = np.zeros((1, W), f32), np.zeros((1, W), f32)
        ub, db, yb = np.zeros((T, W), f32), np.zeros((T, W), f32), np.empty((T, W), f32)
        Bb, Cb, low = np.empty((T, rows), f32), np.empty((T, rows), f32), np.empty((T, rank), f32)
        for task in range(first, last):
            r, group = task // (groups * blocks), task // blocks % groups
            ch = group * width + task % blocks * W
            w = min(W, (group + 1) * width - ch)
            k = r // batch
            ub[:] = 0  # lanes beyond the last channel stay zero
            db[:] = 0
            _gather(bias, k * d + ch, w, bias_, 0)
            _gather(D, k * d + ch, w, skip, 0)
            for s in range(n):
                _gather(A2, (k * n + s) * d + ch, w, a2, s)
            for s in range(rank):
                _gather(dt_weight, (k * rank + s) * d + ch, w, dtw, s)
            h[:] = 0
            for p in range(0, L, T):
                tokens = min(T, L - p)
                if chunks:
                    for s in range(n):
                        _scatter(h, s, w, states, ((r * chunks + p // T) * n + s) * d + ch)
                for i in range(tokens):
                    t = index[k, p + i]
                    _gather(B, ((r * L + t) * groups + group) * B.shape[3] + b0, n, Bb, i)
                    _gather(C, ((r * L + t) * groups + group) * C.shape[3] + c0, n, Cb, i)
                    _gather(u, (r * L + t) * d + ch, w, ub, i)
                    _gather_delta(r, t, group, ch, w, rank, L, d, delta, B, db, low, i)
                for i in range(tokens):
                    for j in range(0, W, LANES):
                        dl, ul = _raw_delta(i, j, W, rank, dtw, bias_, db, low), _load(ub, i * W + j)
                        if softplus:
                            dl = _softplus(dl)
                        _store(db, i * W + j, dl)
                        _store(yb, i * W + j, _load(skip, j) * ul)
                        _store(ub, i * W + j, dl * ul)
                for i in range(tokens):
                    for j in range(0, W, LANES):
                        at = i * W + j
                        dl, ul, acc = _load(db, at), _load(ub, at), _load(yb, at)
                        for s in range(n):
                            at = s * W + j
                            x = dl * _load(a2, at)
                            x = _exp2_of_negative(x) if decaying else _exp2(x)
                            x = x * _load(h, at) + ul * _splat(Bb[i, s])
                            _store(h, at, x)
                            acc = acc + x * _splat(Cb[i, s])
                        _store(yb, i * W + j, acc)
                for i in range(tokens):
                    _scatter(yb, i, w, y, (r * L + index[k, p + i]) * d + ch)
            for s in range(n):
                for j in range(w):
                    ends[r, ch + j, s] = h[s, j]

    return kernel


@cache
def scan_backward(W: int, decaying: bool):
    """
    The backward scan over blocks of W channels, a multiple of 32; tasks and ``decaying`` as above. Recomputes a chunk's
    states from its first and walks it back. Sums over channels (dB, dC) are written per block, without atomics.
    """
    T = TOKENS

    @_jit
    def kernel(first, last, batch, u, delta, dt_weight, bias, softplus, A2, D, B, b0, C, c0, index, states, dy,
               du, ddelta, ddt_weight, dB, dC, dA, dD, dbias):  # fmt: skip
        R, L, d = u.shape
        groups, n = B.shape[2], A2.shape[1]
        rows = (n + LANES - 1) // LANES * LANES
        width = d // groups
        blocks = (width + W - 1) // W
        rank = dt_weight.shape[1]
        chunks = states.shape[1]
        shared_dy = dy.shape[0] == batch  # the orders of a mixer share their output's gradient
        a2, carry, dAb = np.zeros((n, W), f32), np.empty((n, W), f32), np.empty((n, W), f32)
        hs, decays = np.zeros(((T + 1) * n, W), f32), np.empty((T * n, W), f32)
        dtw, ddtw = np.zeros((rank, W), f32), np.empty((rank, W), f32)
        low, dlow = np.empty((T, rank), f32), np.empty((rank, T), f32)
        bias_, skip = np.zeros((1, W), f32), np.zeros((1, W), f32)
        dDb, dbiasb = np.empty((1, W), f32), np.empty((1, W), f32)
        ub, db, raw, dyb = np.zeros((T, W), f32), np.zeros((T, W), f32), np.zeros((T, W), f32), np.zeros((T, W), f32)
        gu, ga = np.zeros((T, W), f32), np.zeros((T, W), f32)
        Bb, Cb = np.empty((T, rows), f32), np.empty((T, rows), f32)
        dBb, dCb = np.empty((T, rows), f32), np.empty((T, rows), f32)
        sums_b, sums_c = np.zeros((rows, LANES), f32), np.zeros((rows, LANES), f32)
        zero, ln2 = _splat(f32(0.0)), _splat(LN2)
        for task in range(first, last):
            r, group, block = task // (groups * blocks), task // blocks % groups, task % blocks
            ch = group * width + block * W
            w = min(W, (group + 1) * width - ch)
            k = r // batch
            ry = r % batch if shared_dy else r
            ub[:], db[:], raw[:], dyb[:] = 0, 0, 0, 0  # lanes beyond the last channel stay zero
            carry[:], dAb[:], dDb[:], dbiasb[:], ddtw[:] = 0, 0, 0, 0, 0
            _gather(bias, k * d + ch, w, bias_, 0)
            _gather(D, k * d + ch, w, skip, 0)
            for s in range(n):
                _gather(A2, (k * n + s) * d + ch, w, a2, s)
            for s in range(rank):
                _gather(dt_weight, (k * rank + s) * d + ch, w, dtw, s)
            for chunk in range(chunks - 1, -1, -1):
                p = chunk * T
                tokens = min(T, L - p)
                for i in range(tokens):
                    t = index[k, p + i]
                    _gather(B, ((r * L + t) * groups + group) * B.shape[3] + b0, n, Bb, i)
                    _gather(C, ((r * L + t) * groups + group) * C.shape[3] + c0, n, Cb, i)
                    _gather(u, (r * L + t) * d + ch, w, ub, i)
                    _gather(dy, (ry * L + t) * d + ch, w, dyb, i)
                    _gather_delta(r, t, group, ch, w, rank, L, d, delta, B, raw, low, i)
                for i in range(tokens):
                    for j in range(0, W, LANES):
                        dl = _raw_delta(i, j, W, rank, dtw, bias_, raw, low)
                        _store(raw, i * W + j, dl)
                        if softplus:
                            dl = _softplus(dl)
                        _store(db, i * W + j, dl)
                for s in range(n):
                    _gather(states, ((r * chunks + chunk) * n + s) * d + ch, w, hs, s)
                for i in range(tokens):
                    for j in range(0, W, LANES):
                        dl = _load(db, i * W + j)
                        dul = dl * _load(ub, i * W + j)
                        for s in range(n):
                            at = (i * n + s) * W + j
                            decay = dl * _load(a2, s * W + j)
                            decay = _exp2_of_negative(decay) if decaying else _exp2(decay)
                            _store(decays, at, decay)
                            _store(hs, at + n * W, decay * _load(hs, at) + dul * _splat(Bb[i, s]))
                for i in range(tokens - 1, -1, -1):
                    for j in range(0, W, PAIR):
                        at, at2 = i * W + j, i * W + j + LANES
                        dl, ul, dyl = _load(db, at), _load(ub, at), _load(dyb, at)
                        dl2, ul2, dyl2 = _load(db, at2), _load(ub, at2), _load(dyb, at2)
                        dul, dul2 = dl * ul, dl2 * ul2
                        gB, gA, gB2, gA2 = zero, zero, zero, zero
                        for s in range(n):
                            b, c = _splat(Bb[i, s]), _splat(Cb[i, s])
                            at, at2 = s * W + j, s * W + j + LANES
                            hat, hat2 = i * n * W + at, i * n * W + at2
                            dh, dh2 = _load(carry, at) + dyl * c, _load(carry, at2) + dyl2 * c
                            sum_c = dyl * _load(hs, hat + n * W) + dyl2 * _load(hs, hat2 + n * W)
                            sum_b = dh * dul + dh2 * dul2
                            if j:
                                sum_b, sum_c = sum_b + _load(sums_b, s * LANES), sum_c + _load(sums_c, s * LANES)
                            _store(sums_b, s * LANES, sum_b)
                            _store(sums_c, s * LANES, sum_c)
                            gB, gB2 = gB + dh * b, gB2 + dh2 * b
                            x, x2 = _load(decays, hat) * dh, _load(decays, hat2) * dh2
                            _store(carry, at, x)
                            _store(carry, at2, x2)
                            x, x2 = x * _load(hs, hat), x2 * _load(hs, hat2)
                            gA, gA2 = gA + x * _load(a2, at), gA2 + x2 * _load(a2, at2)
                            _store(dAb, at, _load(dAb, at) + x * dl)
                            _store(dAb, at2, _load(dAb, at2) + x2 * dl2)
                        at, at2 = i * W + j, i * W + j + LANES
                        _store(ga, at, gB * ul + gA * ln2)
                        _store(ga, at2, gB2 * ul2 + gA2 * ln2)
                        _store(gu, at, gB * dl + dyl * _load(skip, j))
                        _store(gu, at2, gB2 * dl2 + dyl2 * _load(skip, j + LANES))
                    for s in range(0, rows, LANES):
                        _store(dBb, i * rows + s, _sum_rows(sums_b, s * LANES))
                        _store(dCb, i * rows + s, _sum_rows(sums_c, s * LANES))
                for i in range(tokens):
                    for j in range(0, W, LANES):
                        x = _load(ga, i * W + j)
                        if softplus:
                            x = x * _sigmoid(_load(raw, i * W + j))
                            _store(ga, i * W + j, x)
                        _store(dbiasb, j, _load(dbiasb, j) + x)
                        _store(dDb, j, _load(dDb, j) + _load(dyb, i * W + j) * _load(ub, i * W + j))
                        for s in range(rank):
                            _store(ddtw, s * W + j, _load(ddtw, s * W + j) + x * _splat(low[i, s]))
                for s in range(rank):
                    for first_token in range(0, tokens, LANES):
                        for i in range(LANES):
                            x = zero
                            for j in range(0, W, LANES):
                                x = x + _load(ga, (first_token + i) * W + j) * _load(dtw, s * W + j)
                            _store(sums_b, i * LANES, x)
                        _store(dlow, s * T + first_token, _sum_rows(sums_b, 0))
                for i in range(tokens):
                    t = index[k, p + i]
                    at = ((block * R + r) * L + t) * groups + group
                    _scatter(dBb, i, n, dB, at * B.shape[3] + b0)
                    _scatter(dCb, i, n, dC, at * C.shape[3] + c0)
                    _scatter(gu, i, w, du, (r * L + t) * d + ch)
                    if rank:
                        for s in range(rank):
                            dB[block, r, t, group, s] = dlow[s, i]
                    else:
                        _scatter(ga, i, w, ddelta, (r * L + t) * d + ch)
            for s in range(rank):
                _scatter(ddtw, s, w, ddt_weight, (r * rank + s) * d + ch)
            _scatter(dDb, 0, w, dD, r * d + ch)
            _scatter(dbiasb, 0, w, dbias, r * d + ch)
            for s in range(n):
                _scatter(dAb, s, w, dA, (r * n + s) * d + ch)

    return kernel


@_inline
def _sources(k, t, taps, index, inverse, sources):
    """The tokens under the taps of a token, itself first; returns how many the order has."""
    step = inverse[k, t]
    count = min(taps, step + 1)
    for back in range(count):
        sources[back] = index[k, step - back]
    return count


@_inline
def _convolve(b, j, count, sources, xz, k, weight, bias):
    """16 channels of the causal convolution at one token, before SiLU."""
    L = xz.shape[1]
    taps, d = weight.shape[1:]
    x = _load(bias, k * d + j)
    for back in range(count):
        x = x + _load(weight, (k * taps + taps - 1 - back) * d + j) * _load(xz, (b * L + sources[back]) * 2 * d + j)
    return x


@_jit
def conv_forward(first, last, xz, weight, bias, index, inverse, u):
    """
    Causal depthwise convolution along each order, and SiLU: xz (batch, L, 2 d), weight (K, taps, d), bias (K, d) to
    u (K, batch, L, d). A task is a token.
    """
    batch, L = xz.shape[:2]
    K, taps, d = weight.shape
    sources = np.empty(taps, np.int64)
    for task in range(first, last):
        b, t = task // L, task % L
        for k in range(K):
            count = _sources(k, t, taps, index, inverse, sources)
            for j in range(0, d, LANES):
                x = _convolve(b, j, count, sources, xz, k, weight, bias)
                _store(u, ((k * batch + b) * L + t) * d + j, x * _sigmoid(x))


@_jit
def conv_backward_pre(first, last, part, xz, weight, bias, index, inverse, du, dweight, dbias):
    """
    First half of the convolution's backward: du (K, batch, L, d) becomes the gradient before SiLU, in place; dweight
    (parts, K, taps, d) and dbias (parts, K, d) take their sums over this part's tasks, tokens.
    """
    batch, L = xz.shape[:2]
    K, taps, d = weight.shape
    sources = np.empty(taps, np.int64)
    one = _splat(f32(1.0))
    for task in range(first, last):
        b, t = task // L, task % L
        for k in range(K):
            count = _sources(k, t, taps, index, inverse, sources)
            for j in range(0, d, LANES):
                at = ((k * batch + b) * L + t) * d + j
                x = _convolve(b, j, count, sources, xz, k, weight, bias)
                s = _sigmoid(x)
                x = _load(du, at) * s * (one + x * (one - s))
                _store(du, at, x)
                at = (part * K + k) * d + j
                _store(dbias, at, _load(dbias, at) + x)
                for back in range(count):
                    at = ((part * K + k) * taps + taps - 1 - back) * d + j
                    _store(dweight, at, _load(dweight, at) + x * _load(xz, (b * L + sources[back]) * 2 * d + j))


@_jit
def conv_backward_input(first, last, weight, index, inverse, dpre, dxz):
    """Second half: dpre (K, batch, L, d) to the first d channels of dxz (batch, L, 2 d). A task is a token."""
    batch, L = dxz.shape[:2]
    K, taps, d = weight.shape
    zero = _splat(f32(0.0))
    for task in range(first, last):
        b, t = task // L, task % L
        for j in range(0, d, LANES):
            x = zero
            for k in range(K):
                step = inverse[k, t]
                for ahead in range(min(taps, L - step)):
                    at = ((k * batch + b) * L + index[k, step + ahead]) * d + j
                    x = x + _load(weight, (k * taps + taps - 1 - ahead) * d + j) * _load(dpre, at)
            _store(dxz, (b * L + t) * 2 * d + j, x)


@_jit
def gate_forward(first, last, xz, y, out, keep):
    """
    out = SiLU(z) * sum of y over the orders: xz (batch, L, 2 d), y (K, batch, L, d), out (batch, L, d), which may be
    y's first order; keep, empty or as out, takes the sum. A task is a token.
    """
    batch, L, d = out.shape
    K = y.shape[0]
    for token in range(first, last):
        for j in range(0, d, LANES):
            x = _load(y, token * d + j)
            for k in range(1, K):
                x = x + _load(y, (k * batch * L + token) * d + j)
            if keep.shape[0]:
                _store(keep, token * d + j, x)
            z = _load(xz, (token * 2 + 1) * d + j)
            _store(out, token * d + j, x * z * _sigmoid(z))


@_jit
def gate_backward(first, last, xz, kept, dout, dy, dxz):
    """The gate's backward: dy (batch, L, d), and the last d channels of dxz (batch, L, 2 d). A task is a token."""
    d = dout.shape[2]
    one = _splat(f32(1.0))
    for token in range(first, last):
        for j in range(0, d, LANES):
            z, g = _load(xz, (token * 2 + 1) * d + j), _load(dout, token * d + j)
            s = _sigmoid(z)
            _store(dy, token * d + j, g * z * s)
            _store(dxz, (token * 2 + 1) * d + j, g * _load(kept, token * d + j) * s * (one + z * (one - s)))
