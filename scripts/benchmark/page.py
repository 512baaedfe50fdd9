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

import re
from pathlib import Path

from scripts.output import write_text

__all__ = ["page"]

_BLOCK = re.compile(r"(<!-- ([\w-]+/\S+\.md) -->\n).*?(<!-- end -->)", re.DOTALL)


def page(path: str = "docs/benchmarks.md") -> None:
    """
    Put the tables that the benchmarks, or scripts.report, wrote into the page that explains them: what stands between
    ``<!-- FOLDER/NAME.md -->`` and ``<!-- end -->`` is replaced by that file.

    Args:
        path: of the page.
    """
    file = Path(path)

    def table(block: re.Match) -> str:
        return f"{block[1]}\n{(file.parent / block[2]).read_text().strip()}\n\n{block[3]}"

    text = _BLOCK.sub(table, file.read_text())
    write_text(file, text)
    print(f"written: {path}")
