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
# 2^x = 1 + E1 x + ... + E5 x^5 on [-0.5, 0.5], exact at 0: the minimax fit, relative error 1e-7 before rounding
E1, E2, E3, E4, E5 = (f32(e) for e in (0.693147, 0.24022242, 0.055507336, 0.009671513, 0.0013264727))

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


@intrinsic
def _pointer(typingctx, array):
    """
    Where an array's elements lie. The loops work on pointers alone, since numba counts the references to an array
    atomically around each function that is given it, inlined or not, which took longer than the arithmetic.
    """

    def codegen(context, builder, sig, args):
        return context.make_array(sig.args[0])(context, builder, args[0]).data

    return types.CPointer(array.dtype)(array), codegen


@intrinsic
def _behind(typingctx, pointer, offset):
    """The pointer ``offset`` elements further on."""

    def codegen(context, builder, sig, args):
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.int64), codegen


def _address(builder, pointer, offset):
    return builder.bitcast(builder.gep(pointer, [offset]), _VECTOR.as_pointer())


@intrinsic
def _load(typingctx, pointer, offset):
    """16 float32 values from an offset on."""

    def codegen(context, builder, sig, args):
        return builder.load(_address(builder, *args), align=4)

    return _lanes(pointer, types.int64), codegen


@intrinsic
def _store(typingctx, pointer, offset, value):
    """Write 16 float32 values from an offset on."""

    def codegen(context, builder, sig, args):
        builder.store(args[2], _address(builder, *args[:2]), align=4)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, _lanes), codegen


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
def _sum_rows(typingctx, pointer, offset):
    """Lane i is the sum of row i of 16 rows of 16 values from an offset on: a tree of shuffles."""

    def codegen(context, builder, sig, args):
        start = _address(builder, *args)
        rows = [builder.load(builder.gep(start, [ir.Constant(ir.IntType(32), i)]), align=4) for i in range(LANES)]
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

    return _lanes(pointer, types.int64), codegen


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
    p = _splat(E4) + x * _splat(E5)
    p = _splat(E3) + x * p
    p = _splat(E2) + x * p
    p = _splat(E1) + x * p
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
def _copy(source, at, target, to, W, w):
    """Copy ``w`` of a block's W channels."""
    if w == W:
        for j in range(0, W, LANES):
            _store(target, to + j, _load(source, at + j))
    else:
        for j in range(w):
            target[to + j] = source[at + j]


@_inline
def _copy_states(source, at, target, to, n):
    """Copy what a token has for each of n states."""
    for s in range(n // LANES * LANES, n):
        target[to + s] = source[at + s]
    for s in range(0, n - LANES + 1, LANES):
        _store(target, to + s, _load(source, at + s))


@_inline
def _clear(pointer, count):
    for i in range(0, count, LANES):
        _store(pointer, i, _splat(f32(0.0)))


@_inline
def _raw_delta(at, j, W, rank, dt_weight, bias, raw, low):
    """16 step sizes of a token before softplus."""
    x = _load(bias, j)
    if rank:
        for s in range(rank):
            x = x + _splat(low[s]) * _load(dt_weight, s * W + j)
        return x
    return x + _load(raw, at)


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
        columns_b, columns_c = B.shape[3], C.shape[3]
        u, delta, dt_weight, bias, A2, D = (
            _pointer(u), _pointer(delta), _pointer(dt_weight), _pointer(bias), _pointer(A2), _pointer(D)
        )  # fmt: skip
        B, C, index, y, states, ends = (
            _pointer(B), _pointer(C), _pointer(index), _pointer(y), _pointer(states), _pointer(ends)
        )  # fmt: skip
        memory = np.empty((2 * n + rank + 2 + 3 * T) * W + T * (2 * rows + rank) + LANES, f32)
        a2 = _behind(_pointer(memory), -memory.ctypes.data // 4 % LANES)  # whole cache lines
        h = _behind(a2, n * W)
        dtw = _behind(h, n * W)
        bias_ = _behind(dtw, rank * W)
        skip = _behind(bias_, W)
        ub = _behind(skip, W)
        db = _behind(ub, T * W)
        yb = _behind(db, T * W)
        Bb = _behind(yb, T * W)
        Cb = _behind(Bb, T * rows)
        low = _behind(Cb, T * rows)
        for task in range(first, last):
            r, group = task // (groups * blocks), task // blocks % groups
            ch = group * width + task % blocks * W
            w = min(W, (group + 1) * width - ch)
            k = r // batch
            _clear(a2, (2 * n + rank + 2 + 2 * T) * W)  # lanes beyond the last channel stay zero
            _copy(bias, k * d + ch, bias_, 0, W, w)
            _copy(D, k * d + ch, skip, 0, W, w)
            for s in range(n):
                _copy(A2, (k * n + s) * d + ch, a2, s * W, W, w)
            for s in range(rank):
                _copy(dt_weight, (k * rank + s) * d + ch, dtw, s * W, W, w)
            for p in range(0, L, T):
                tokens = min(T, L - p)
                if chunks:
                    for s in range(n):
                        _copy(h, s * W, states, ((r * chunks + p // T) * n + s) * d + ch, W, w)
                for i in range(tokens):
                    t = r * L + index[k * L + p + i]
                    b, c = (t * groups + group) * columns_b, (t * groups + group) * columns_c
                    _copy_states(B, b + b0, Bb, i * rows, n)
                    _copy_states(C, c + c0, Cb, i * rows, n)
                    _copy(u, t * d + ch, ub, i * W, W, w)
                    if rank:
                        for s in range(rank):
                            low[i * rank + s] = B[b + s]
                    else:
                        _copy(delta, t * d + ch, db, i * W, W, w)
                for i in range(tokens):
                    for j in range(0, W, LANES):
                        at = i * W + j
                        dl, ul = _raw_delta(at, j, W, rank, dtw, bias_, db, _behind(low, i * rank)), _load(ub, at)
                        if decaying or softplus:
                            dl = _softplus(dl)
                        _store(db, at, dl)
                        _store(yb, at, _load(skip, j) * ul)
                        _store(ub, at, dl * ul)
                for i in range(tokens):
                    for j in range(0, W, LANES):
                        at = i * W + j
                        dl, ul, acc = _load(db, at), _load(ub, at), _load(yb, at)
                        for s in range(n):
                            at = s * W + j
                            x = dl * _load(a2, at)
                            x = _exp2_of_negative(x) if decaying else _exp2(x)
                            x = x * _load(h, at) + ul * _splat(Bb[i * rows + s])
                            _store(h, at, x)
                            acc = acc + x * _splat(Cb[i * rows + s])
                        _store(yb, i * W + j, acc)
                for i in range(tokens):
                    _copy(yb, i * W, y, (r * L + index[k * L + p + i]) * d + ch, W, w)
            for s in range(n):
                for j in range(w):
                    ends[(r * d + ch + j) * n + s] = h[s * W + j]
        memory[0] = 0  # numba frees an array after its last use: this one

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
        columns_b, columns_c = B.shape[3], C.shape[3]
        shared_dy = dy.shape[0] == batch  # the orders of a mixer share their output's gradient
        u, delta, dt_weight, bias, A2, D = (
            _pointer(u), _pointer(delta), _pointer(dt_weight), _pointer(bias), _pointer(A2), _pointer(D)
        )  # fmt: skip
        B, C, index, states, dy, du = (
            _pointer(B), _pointer(C), _pointer(index), _pointer(states), _pointer(dy), _pointer(du)
        )  # fmt: skip
        ddelta, ddt_weight, dB, dC = _pointer(ddelta), _pointer(ddt_weight), _pointer(dB), _pointer(dC)
        dA, dD, dbias = _pointer(dA), _pointer(dD), _pointer(dbias)
        size = (3 * n + 2 * rank + 4 + 6 * T + (2 * T + 1) * n) * W + T * (4 * rows + 2 * rank) + 2 * rows * LANES
        memory = np.empty(size + LANES, f32)
        a2 = _behind(_pointer(memory), -memory.ctypes.data // 4 % LANES)  # whole cache lines
        carry = _behind(a2, n * W)
        dAb = _behind(carry, n * W)
        dtw = _behind(dAb, n * W)
        ddtw = _behind(dtw, rank * W)
        bias_ = _behind(ddtw, rank * W)
        skip = _behind(bias_, W)
        dDb = _behind(skip, W)
        dbiasb = _behind(dDb, W)
        ub = _behind(dbiasb, W)
        db = _behind(ub, T * W)
        raw = _behind(db, T * W)
        dyb = _behind(raw, T * W)
        gu = _behind(dyb, T * W)
        ga = _behind(gu, T * W)
        hs = _behind(ga, T * W)
        decays = _behind(hs, (T + 1) * n * W)
        Bb = _behind(decays, T * n * W)
        Cb = _behind(Bb, T * rows)
        dBb = _behind(Cb, T * rows)
        dCb = _behind(dBb, T * rows)
        sums_b = _behind(dCb, T * rows)
        sums_c = _behind(sums_b, rows * LANES)
        low = _behind(sums_c, rows * LANES)
        dlow = _behind(low, T * rank)
        zero, ln2 = _splat(f32(0.0)), _splat(LN2)
        _clear(a2, size)
        for task in range(first, last):
            r, group, block = task // (groups * blocks), task // blocks % groups, task % blocks
            ch = group * width + block * W
            w = min(W, (group + 1) * width - ch)
            k = r // batch
            ry = r % batch if shared_dy else r
            _clear(a2, (3 * n + 2 * rank + 4 + 4 * T) * W)  # lanes beyond the last channel stay zero
            _copy(bias, k * d + ch, bias_, 0, W, w)
            _copy(D, k * d + ch, skip, 0, W, w)
            for s in range(n):
                _copy(A2, (k * n + s) * d + ch, a2, s * W, W, w)
            for s in range(rank):
                _copy(dt_weight, (k * rank + s) * d + ch, dtw, s * W, W, w)
            for chunk in range(chunks - 1, -1, -1):
                p = chunk * T
                tokens = min(T, L - p)
                for i in range(tokens):
                    step = index[k * L + p + i]
                    t = r * L + step
                    b, c = (t * groups + group) * columns_b, (t * groups + group) * columns_c
                    _copy_states(B, b + b0, Bb, i * rows, n)
                    _copy_states(C, c + c0, Cb, i * rows, n)
                    _copy(u, t * d + ch, ub, i * W, W, w)
                    _copy(dy, (ry * L + step) * d + ch, dyb, i * W, W, w)
                    if rank:
                        for s in range(rank):
                            low[i * rank + s] = B[b + s]
                    else:
                        _copy(delta, t * d + ch, raw, i * W, W, w)
                for i in range(tokens):
                    for j in range(0, W, LANES):
                        at = i * W + j
                        dl = _raw_delta(at, j, W, rank, dtw, bias_, raw, _behind(low, i * rank))
                        _store(raw, at, dl)
                        if decaying or softplus:
                            dl = _softplus(dl)
                        _store(db, at, dl)
                for s in range(n):
                    _copy(states, ((r * chunks + chunk) * n + s) * d + ch, hs, s * W, W, w)
                for i in range(tokens):
                    for j in range(0, W, LANES):
                        dl = _load(db, i * W + j)
                        dul = dl * _load(ub, i * W + j)
                        for s in range(n):
                            at = (i * n + s) * W + j
                            decay = dl * _load(a2, s * W + j)
                            decay = _exp2_of_negative(decay) if decaying else _exp2(decay)
                            _store(decays, at, decay)
                            _store(hs, at + n * W, decay * _load(hs, at) + dul * _splat(Bb[i * rows + s]))
                for i in range(tokens - 1, -1, -1):
                    for j in range(0, W, PAIR):
                        at, at2 = i * W + j, i * W + j + LANES
                        dl, ul, dyl = _load(db, at), _load(ub, at), _load(dyb, at)
                        dl2, ul2, dyl2 = _load(db, at2), _load(ub, at2), _load(dyb, at2)
                        dul, dul2 = dl * ul, dl2 * ul2
                        gB, gA, gB2, gA2 = zero, zero, zero, zero
                        for s in range(n):
                            b_, c_ = _splat(Bb[i * rows + s]), _splat(Cb[i * rows + s])
                            at, at2 = s * W + j, s * W + j + LANES
                            hat, hat2 = i * n * W + at, i * n * W + at2
                            dh, dh2 = _load(carry, at) + dyl * c_, _load(carry, at2) + dyl2 * c_
                            sum_c = dyl * _load(hs, hat + n * W) + dyl2 * _load(hs, hat2 + n * W)
                            sum_b = dh * dul + dh2 * dul2
                            if j:
                                sum_b, sum_c = sum_b + _load(sums_b, s * LANES), sum_c + _load(sums_c, s * LANES)
                            _store(sums_b, s * LANES, sum_b)
                            _store(sums_c, s * LANES, sum_c)
                            gB, gB2 = gB + dh * b_, gB2 + dh2 * b_
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
                        at = i * W + j
                        x = _load(ga, at)
                        if decaying or softplus:
                            x = x * _sigmoid(_load(raw, at))
                            _store(ga, at, x)
                        _store(dbiasb, j, _load(dbiasb, j) + x)
                        _store(dDb, j, _load(dDb, j) + _load(dyb, at) * _load(ub, at))
                        for s in range(rank):
                            _store(ddtw, s * W + j, _load(ddtw, s * W + j) + x * _splat(low[i * rank + s]))
                for s in range(rank):
                    for first_token in range(0, tokens, LANES):
                        for i in range(LANES):
                            x = zero
                            for j in range(0, W, LANES):
                                x = x + _load(ga, (first_token + i) * W + j) * _load(dtw, s * W + j)
                            _store(sums_b, i * LANES, x)
                        _store(dlow, s * T + first_token, _sum_rows(sums_b, 0))
                for i in range(tokens):
                    t = r * L + index[k * L + p + i]
                    at = (block * R * L + t) * groups + group
                    _copy_states(dBb, i * rows, dB, at * columns_b + b0, n)
                    _copy_states(dCb, i * rows, dC, at * columns_c + c0, n)
                    _copy(gu, i * W, du, t * d + ch, W, w)
                    if rank:
                        for s in range(rank):
                            dB[at * columns_b + s] = dlow[s * T + i]
                    else:
                        _copy(ga, i * W, ddelta, t * d + ch, W, w)
            for s in range(rank):
                _copy(ddtw, s * W, ddt_weight, (r * rank + s) * d + ch, W, w)
            _copy(dDb, 0, dD, r * d + ch, W, w)
            _copy(dbiasb, 0, dbias, r * d + ch, W, w)
            for s in range(n):
                _copy(dAb, s * W, dA, (r * n + s) * d + ch, W, w)
        memory[0] = 0  # numba frees an array after its last use: this one

    return kernel


@_inline
def _sources(step, taps, index, sources):
    """The tokens under the taps at a step of an order, its own first; returns how many the order has."""
    count = min(taps, step + 1)
    for back in range(count):
        sources[back] = index[step - back]
    return count


@_inline
def _convolve(j, count, sources, xz, weight, bias, taps, d):
    """16 channels of the causal convolution at one token, before SiLU."""
    x = _load(bias, j)
    for back in range(count):
        x = x + _load(weight, (taps - 1 - back) * d + j) * _load(xz, sources[back] * 2 * d + j)
    return x


@_jit
def conv_forward(first, last, xz, weight, bias, index, inverse, u):
    """
    Causal depthwise convolution along each order, and SiLU: xz (batch, L, 2 d), weight (K, taps, d), bias (K, d) to
    u (K, batch, L, d). A task is a token.
    """
    batch, L = xz.shape[:2]
    K, taps, d = weight.shape
    memory = np.empty(taps, np.int64)
    xz, weight, bias, index = _pointer(xz), _pointer(weight), _pointer(bias), _pointer(index)
    inverse, u, sources = _pointer(inverse), _pointer(u), _pointer(memory)
    for task in range(first, last):
        b, t = task // L, task % L
        for k in range(K):
            count = _sources(inverse[k * L + t], taps, _behind(index, k * L), sources)
            volume, weight_, bias_ = _behind(xz, b * L * 2 * d), _behind(weight, k * taps * d), _behind(bias, k * d)
            for j in range(0, d, LANES):
                x = _convolve(j, count, sources, volume, weight_, bias_, taps, d)
                _store(u, ((k * batch + b) * L + t) * d + j, x * _sigmoid(x))
    memory[0] = 0  # its last use


@_jit
def conv_backward_pre(first, last, part, xz, weight, bias, index, inverse, du, dweight, dbias):
    """
    First half of the convolution's backward: du (K, batch, L, d) becomes the gradient before SiLU, in place; dweight
    (parts, K, taps, d) and dbias (parts, K, d) take their sums over this part's tasks, tokens.
    """
    batch, L = xz.shape[:2]
    K, taps, d = weight.shape
    memory = np.empty(taps, np.int64)
    xz, weight, bias, index = _pointer(xz), _pointer(weight), _pointer(bias), _pointer(index)
    inverse, du, dweight, dbias = _pointer(inverse), _pointer(du), _pointer(dweight), _pointer(dbias)
    sources = _pointer(memory)
    one = _splat(f32(1.0))
    for task in range(first, last):
        b, t = task // L, task % L
        for k in range(K):
            count = _sources(inverse[k * L + t], taps, _behind(index, k * L), sources)
            volume, weight_, bias_ = _behind(xz, b * L * 2 * d), _behind(weight, k * taps * d), _behind(bias, k * d)
            for j in range(0, d, LANES):
                at = ((k * batch + b) * L + t) * d + j
                x = _convolve(j, count, sources, volume, weight_, bias_, taps, d)
                s = _sigmoid(x)
                x = _load(du, at) * s * (one + x * (one - s))
                _store(du, at, x)
                at = (part * K + k) * d + j
                _store(dbias, at, _load(dbias, at) + x)
                for back in range(count):
                    at = ((part * K + k) * taps + taps - 1 - back) * d + j
                    _store(dweight, at, _load(dweight, at) + x * _load(volume, sources[back] * 2 * d + j))
    memory[0] = 0  # its last use


@_jit
def conv_backward_input(first, last, weight, index, inverse, dpre, dxz):
    """Second half: dpre (K, batch, L, d) to the first d channels of dxz (batch, L, 2 d). A task is a token."""
    batch, L = dxz.shape[:2]
    K, taps, d = weight.shape
    weight, index, inverse, dpre, dxz = (
        _pointer(weight), _pointer(index), _pointer(inverse), _pointer(dpre), _pointer(dxz)
    )  # fmt: skip
    zero = _splat(f32(0.0))
    for task in range(first, last):
        b, t = task // L, task % L
        for j in range(0, d, LANES):
            x = zero
            for k in range(K):
                step = inverse[k * L + t]
                for ahead in range(min(taps, L - step)):
                    at = ((k * batch + b) * L + index[k * L + step + ahead]) * d + j
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
    keeping = keep.shape[0] > 0
    xz, y, out, keep = _pointer(xz), _pointer(y), _pointer(out), _pointer(keep)
    for token in range(first, last):
        for j in range(0, d, LANES):
            x = _load(y, token * d + j)
            for k in range(1, K):
                x = x + _load(y, (k * batch * L + token) * d + j)
            if keeping:
                _store(keep, token * d + j, x)
            z = _load(xz, (token * 2 + 1) * d + j)
            _store(out, token * d + j, x * z * _sigmoid(z))


@_jit
def gate_backward(first, last, xz, kept, dout, dy, dxz):
    """The gate's backward: dy (batch, L, d), and the last d channels of dxz (batch, L, 2 d). A task is a token."""
    d = dout.shape[2]
    xz, kept, dout, dy, dxz = _pointer(xz), _pointer(kept), _pointer(dout), _pointer(dy), _pointer(dxz)
    one = _splat(f32(1.0))
    for token in range(first, last):
        for j in range(0, d, LANES):
            z, g = _load(xz, (token * 2 + 1) * d + j), _load(dout, token * d + j)
            s = _sigmoid(z)
            _store(dy, token * d + j, g * z * s)
            _store(dxz, (token * 2 + 1) * d + j, g * _load(kept, token * d + j) * s * (one + z * (one - s)))
