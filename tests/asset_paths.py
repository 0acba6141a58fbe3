"""Where `make setup` puts the trained model and the text."""

from __future__ import annotations

import os
from pathlib import Path

ASSETS = Path(os.environ.get("SPENSE_ASSETS", Path(__file__).parent.parent / ".cache" / "assets")).absolute()
