"""``python -m fastvdm``."""

from __future__ import annotations

import sys

from fastvdm.cli import main

sys.exit(main())
