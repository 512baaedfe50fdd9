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

import importlib
import importlib.util
import logging
import os
from functools import cache
from types import ModuleType

import torch

__all__ = ["ENGINES", "ENGINE_VARIABLE", "available_engines", "resolve_engine"]

ENGINES = ("mamba_ssm", "numba", "chunked", "reference")  # by preference
ENGINE_VARIABLE = "SEGRESMAMBA_SCAN"

logger = logging.getLogger(__name__)


@cache
def _missing(name: str) -> str | None:
    """Why an engine cannot run on this machine, or None."""
    if name == "numba" and importlib.util.find_spec("numba") is None:
        return "numba is not installed: pip install numba"
    if name == "mamba_ssm":
        return _load(name).unavailable()
    return None


def _unsuited(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an engine does not take tensors of this device and dtype, or None."""
    if name == "numba" and device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {device.type}"
    if name == "mamba_ssm" and device.type != "cuda":
        return f"it runs on CUDA, the tensors are on {device.type}"
    if name in ("numba", "mamba_ssm") and dtype == torch.float64:
        return "it computes in float32, the tensors are float64"
    return None


@cache
def _load(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


@cache
def _log_choice(name: str, device_type: str) -> None:
    logger.info("selective scan on %s: engine %r (%s=<name> forces another)", device_type, name, ENGINE_VARIABLE)


def available_engines(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str | None]:
    """
    Every scan engine with the reason why it does not run on this machine, device and dtype; None where it does.

    Args:
        device: device of the tensors.
        dtype: dtype of the tensors.
    """
    return {name: _missing(name) or _unsuited(name, torch.device(device), dtype) for name in ENGINES}


def resolve_engine(name: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """
    The engine that is to scan tensors of a device and dtype.

    Args:
        name: name of an engine, or ``"auto"``: the first of ``ENGINES`` that runs here. The environment variable
            ``SEGRESMAMBA_SCAN``, where set, stands above it.
        device: device of the tensors.
        dtype: dtype of the tensors.

    Returns:
        the engine's module.

    Raises:
        ValueError: when no engine has that name.
        RuntimeError: when the engine cannot run here; says why and what to install.
    """
    forced = os.environ.get(ENGINE_VARIABLE)
    name = forced or name
    if name == "auto":
        name = next(n for n in ENGINES if not (_missing(n) or _unsuited(n, device, dtype)))
        _log_choice(name, device.type)
        return _load(name)
    source = f" (from the environment variable {ENGINE_VARIABLE})" if forced else ""
    if name not in ENGINES:
        raise ValueError(f"unknown scan engine {name!r}{source}: expected 'auto' or one of {', '.join(ENGINES)}.")
    reason = _missing(name) or _unsuited(name, device, dtype)
    if reason:
        usable = [n for n, why in available_engines(device, dtype).items() if why is None]
        raise RuntimeError(f"scan engine {name!r}{source} is not available: {reason}. Usable here: {usable}.")
    return _load(name)
