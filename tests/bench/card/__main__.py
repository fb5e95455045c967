"""See main.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.bench.card.main import main

if __name__ == "__main__":
    sys.exit(main())
