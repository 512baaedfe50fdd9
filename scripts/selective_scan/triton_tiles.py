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
What a program of the ``triton`` engine's kernels works on: a chunk of the steps of an order, and a block of channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["place", "tokens_of"]


@triton.jit
def place(d, g, chunks, W: tl.constexpr):
    """What a program of the grid (R * chunks * channel blocks,) is for: chunk, row, group, channels."""
    blocks_of_group = tl.cdiv(d // g, W)
    blocks = blocks_of_group * g
    program = tl.program_id(0)
    r, chunk, block = program // (blocks * chunks), program // blocks % chunks, program % blocks
    group = block // blocks_of_group
    channels = group * (d // g) + block % blocks_of_group * W + tl.arange(0, W)
    return chunk.to(tl.int64), r.to(tl.int64), group, channels, channels < (group + 1) * (d // g)


@triton.jit
def tokens_of(index, k, steps, live, L, ORDERED: tl.constexpr, WIDE: tl.constexpr):
    """The tokens at steps. Offsets within a row are 64 bits wide only where they must be: they take registers."""
    token = steps
    if ORDERED:
        token = tl.load(index + k * L + steps, mask=live, other=0)
    return token.to(tl.int64 if WIDE else tl.int32)
