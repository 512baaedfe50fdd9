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

ENGINES = ("numba", "triton", "mamba_ssm", "chunked", "reference")  # by preference; the first is for the CPU alone
ENGINE_VARIABLE = "SEGRESMAMBA_SCAN"

_modules: dict[str, ModuleType] = {}  # of the engines in use

logger = logging.getLogger(__name__)


@cache
def _missing(name: str) -> str | None:
    """Why an engine cannot run on this machine, or None."""
    if name == "numba":
        if importlib.util.find_spec("numba") is None:
            return "numba is not installed: pip install numba"
        try:
            importlib.import_module("numba")
        except ImportError as error:  # as where NumPy is newer than it knows
            return f"numba does not start: {error}"
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: PyTorch for CUDA brings it on Linux; for Windows there is triton-windows"
        if not _interpreted():
            if not torch.cuda.is_available():
                return "needs a CUDA device"
            try:  # its first launch on a machine builds a small library
                importlib.import_module("triton.runtime").driver.active.utils  # noqa: B018
            except Exception as error:
                first = next(iter(str(error).splitlines()), type(error).__name__)
                return f"Triton does not start, often for want of a C compiler or of Python's headers: {first}"
    if name == "mamba_ssm":
        return _load(name).unavailable()
    return None


def _interpreted() -> bool:
    """Whether Triton interprets its kernels, on the CPU: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _unsuited(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an engine does not take tensors of this device and dtype, or None."""
    if name == "numba" and device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {device.type}"
    if name in ("triton", "mamba_ssm") and device.type != "cuda":
        if name == "mamba_ssm" or device.type != "cpu" or not _interpreted():
            return f"it runs on CUDA, the tensors are on {device.type}"
    if name == "triton" and device.type == "cuda":
        if not torch.cuda.is_available():
            return "needs a CUDA device"
        if torch.cuda.get_device_capability(device) < (7, 0):
            return "it needs a GPU of compute capability 7.0 or newer"
        if torch.version.hip is not None:
            return "it is written for NVIDIA's GPUs"
    if name in ("numba", "triton", "mamba_ssm") and dtype == torch.float64:
        return "it computes in float32, the tensors are float64"
    return None


def _why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an engine does not run here with such tensors, or None; Triton is not started for tensors on the CPU."""
    return _unsuited(name, device, dtype) or _missing(name)


def _load(name: str) -> ModuleType:
    if name not in _modules:
        _modules[name] = importlib.import_module(f"{__package__}.{name}")
    return _modules[name]


@cache
def _log_choice(name: str, device_type: str) -> None:
    logger.info("selective scan on %s: engine %r (%s=<name> forces another)", device_type, name, ENGINE_VARIABLE)


@cache
def _log_fallback(name: str, reason: str) -> None:
    logger.warning("selective scan on cuda: engine %r stands in for 'triton', which is not used: %s", name, reason)


def available_engines(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str | None]:
    """
    Every scan engine with the reason why it does not run on this machine, device and dtype; None where it does.

    Args:
        device: device of the tensors.
        dtype: dtype of the tensors.
    """
    return {name: _why_not(name, torch.device(device), dtype) for name in ENGINES}


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
    return _modules[_chosen(name, device, dtype)]


def _chosen(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the engine, which is then among ``_modules``."""
    forced = os.environ.get(ENGINE_VARIABLE)
    name = forced or name
    if name == "auto":
        suited = (n for n in ENGINES if not _why_not(n, device, dtype))
        name = next(n for n in suited if n != "triton" or device.type == "cuda")  # elsewhere it is interpreted: slow
        if name == "numba" and (torch.compiler.is_exporting() or torch.jit.is_tracing()):
            name = "chunked"  # its kernels cannot go into a file
        _log_choice(name, device.type)
        if device.type == "cuda" and name != "triton" and dtype != torch.float64:
            _log_fallback(name, str(_why_not("triton", device, dtype)))
        _load(name)
        return name
    source = f" (from the environment variable {ENGINE_VARIABLE})" if forced else ""
    if name not in ENGINES:
        raise ValueError(f"unknown scan engine {name!r}{source}: expected 'auto' or one of {', '.join(ENGINES)}.")
    reason = _why_not(name, device, dtype)
    if reason:
        usable = [n for n, why in available_engines(device, dtype).items() if why is None]
        raise RuntimeError(f"scan engine {name!r}{source} is not available: {reason}. Usable here: {usable}.")
    _load(name)
    return name


# torch.compile need not look into it. This is all that torch.compiler.assume_constant_result does, but that imports the
# compiler, which takes a second or more at each start.
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]
