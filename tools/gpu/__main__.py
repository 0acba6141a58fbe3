"""`python -m tools.gpu`: see :mod:`tools.gpu.command`."""

from __future__ import annotations

import sys

from tools.gpu.command import main

sys.exit(main())
