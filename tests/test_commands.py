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

"""Every module that is a command has its help, and looks at its options before anything is done."""

from __future__ import annotations

import runpy
import sys

import pytest

from tests.conftest import BUNDLE_ROOT

COMMANDS = [file.stem for file in sorted((BUNDLE_ROOT / "scripts").glob("*.py")) if "    command(" in file.read_text()]

TAKE_ANY = {"complexity", "cross_validation", "export", "phantom"}  # keys of the configs, or of a network


def test_commands_are_found():
    assert {"cross_validation", "experiments", "export", "nnunet", "report", "weights"} <= set(COMMANDS)


@pytest.fixture
def run(monkeypatch):
    """Run a module as ``python -m`` does, in this process."""

    def module(name: str, *options: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *options])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back afterwards
        runpy.run_module(f"scripts.{name}", run_name="__main__")

    return module


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", COMMANDS)
def test_the_help(name, run, capsys):
    with pytest.raises(SystemExit) as end:
        run(name, "--help")
    assert end.value.code == 0 and "SYNOPSIS" in "".join(capsys.readouterr())


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", sorted(set(COMMANDS) - TAKE_ANY))
def test_an_option_that_a_command_does_not_have(name, run):
    with pytest.raises(ValueError, match="there is no option --no_such_option"):
        run(name, "--no_such_option", "1")
