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

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

__all__ = ["run_shares"]

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run_shares(share: Callable[[int], None], count: int) -> None:
    """
    Call ``share(0)`` to ``share(count - 1)`` at once. They run on PyTorch's own OpenMP threads where those can be
    reached: a second pool would fight with them for the cores, since they spin for milliseconds after each operation.

    Args:
        share: releases the GIL for what takes time.
        count: number of shares, at most ``torch.get_num_threads()``.

    Raises:
        Exception: the first that a share has raised.
    """
    if count <= 1:
        return share(0)
    openmp = _openmp()
    if openmp is None:
        futures = [_pool(os.getpid()).submit(share, i) for i in range(1, count)]
        share(0)
        for future in futures:
            future.result()
        return None

    errors: list[BaseException] = []
    pending = iter(range(count))  # a team may be smaller than asked for: its threads take shares until none is left

    def body(_) -> None:
        try:
            for i in pending:
                share(i)
        except BaseException as error:  # an exception cannot cross the C frames between
            errors.append(error)

    openmp.GOMP_parallel(_BODY(body), None, count, 0)
    if errors:
        raise errors[0]
    return None


@cache
def _openmp() -> ctypes.CDLL | None:
    """GNU's OpenMP runtime, if PyTorch has loaded it."""
    if "OpenMP" not in torch.__config__.parallel_info().split("ATen parallel backend:")[-1]:
        return None
    library = ctypes.CDLL(None)
    if not hasattr(library, "GOMP_parallel"):
        return None
    library.GOMP_parallel.argtypes = (_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    library.GOMP_parallel.restype = None
    return library


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """One pool for each process, since threads do not survive a fork."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="selective_scan")
