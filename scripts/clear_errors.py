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

import inspect
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from types import TracebackType

__all__ = ["ClearErrors", "command", "install", "listed"]

_SCRIPTS = Path(__file__).resolve().parent


class ClearErrors:
    """
    An exception hook for runs from the command line, where MONAI wraps whatever a config raises into "Failed to
    instantiate ...". An error that the bundle itself raised about its input is printed as one line; of any other the
    cause is repeated below the traceback. Errors that someone catches never come here.

    Args:
        previous: the hook to call for other errors.
    """

    def __init__(self, previous: Callable[..., object]) -> None:
        self.previous = previous

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """
        Args:
            kind: class of the error.
            error: the error that nobody caught.
            trace: its traceback.
        """
        chain = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        own = next((link for link in chain if _is_own(link)), None)
        if own is not None:
            print(f"\nError: {own}", file=sys.stderr)
            return
        self.previous(kind, error, trace)
        if len(chain) > 1:
            print(f"\n{type(chain[-1]).__name__}: {chain[-1]}", file=sys.stderr)


def _is_own(error: BaseException) -> bool:
    """Whether the bundle itself raised an error about its input."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = bool(frames) and _SCRIPTS in Path(frames[-1].filename).resolve().parents
    return ours and isinstance(error, (ValueError, OSError))


def install() -> None:
    """Put the hook in place, once."""
    if not isinstance(sys.excepthook, ClearErrors):
        sys.excepthook = ClearErrors(sys.excepthook)


def command(function: Callable[..., object]) -> None:
    """
    Run a function as a command, its arguments by fire from the command line. Fire calls first and complains of options
    that are left over afterwards, when everything is written: here an option that the function does not have stops it.
    Nor does fire show the help of a function that takes any option, since ``--help`` might be one.

    Args:
        function: what the command does; its docstring is the help.

    Raises:
        ValueError: When the command line has an option that the function does not have.
    """
    import fire

    install()
    parameters = inspect.signature(function).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    arguments = list(takewhile(lambda argument: argument != "--", sys.argv[1:]))
    for argument in arguments:
        found = re.match(r"--?([A-Za-z_][\w-]*)", argument)
        name = found[1].replace("-", "_") if found else "help"
        short = len(name) == 1 and any(parameter.startswith(name) for parameter in (*parameters, "help"))
        if not (takes_any or short or name == "help" or name in parameters or name.removeprefix("no") in parameters):
            nearest = get_close_matches(name, parameters, n=1)
            raise ValueError(f"there is no option --{name}" + (f": did you mean --{nearest[0]}?" if nearest else "."))
    fire.Fire(function, ["--", "--help"] if "--help" in arguments else None)


def listed(given: str | Sequence[object]) -> list[str]:
    """
    The names in an argument of a command, which fire reads as one text where a name has a number in it, ``a,lr_1e-3``.

    Args:
        given: names, one name, or a text with commas between them.

    Returns:
        the names.
    """
    parts = map(str, given) if isinstance(given, (list, tuple)) else str(given).split(",")
    return [name.strip() for name in parts if name.strip()]
