"""The load tests' package and the gateway of the integration tests, for the tests of this folder."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
for folder in (ROOT, ROOT / "tests" / "integration"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
