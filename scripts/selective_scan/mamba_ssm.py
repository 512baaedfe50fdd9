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

import torch

__all__ = ["scan", "unavailable"]


def unavailable() -> str | None:
    """Why the CUDA kernels of ``mamba-ssm`` cannot be used here, or None where they can."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    try:
        import selective_scan_cuda  # noqa: F401
    except ImportError as error:
        build = "MAMBA_FORCE_BUILD=TRUE pip install mamba-ssm --no-build-isolation"
        return f"its CUDA kernels do not import ({error}); build them: {build}"
    return None


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
    ``mamba-ssm``'s own ``selective_scan_fn`` on its CUDA kernels. Arguments and returns as
    :py:func:`.reference.scan`. It knows no scan order, so here alone the sequence is permuted and copied.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def channels_first(x: torch.Tensor) -> torch.Tensor:
        x = x if index is None else x[:, index]
        return x.movedim(1, -1).contiguous()

    y, last_state = selective_scan_fn(
        channels_first(u),
        channels_first(delta.to(u.dtype)),
        A.float(),
        channels_first(B.to(u.dtype)),
        channels_first(C.to(u.dtype)),
        None if D is None else D.float(),
        None if z is None else channels_first(z.to(u.dtype)),
        None if delta_bias is None else delta_bias.float(),
        delta_softplus,
        return_last_state=True,
    )
    y = y.transpose(1, 2)
    if index is not None:
        y = torch.empty_like(y).index_copy(1, index, y)
    return y, last_state
