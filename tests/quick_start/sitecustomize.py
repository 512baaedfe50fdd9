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
In PYTHONPATH of ``make test``. MONAI imports MLflow and scikit-learn at every start where they are installed, which
takes a quarter of it: here they seem not to be, as with most users. tests/test_tracking.py has them back.
"""

import sys

for _name in ("mlflow", "sklearn"):
    sys.modules[_name] = None  # type: ignore[assignment]
