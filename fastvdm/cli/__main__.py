"""``python -m fastvdm.cli``, as ``accelerate launch -m`` needs it."""

from __future__ import annotations

import sys

from fastvdm.cli import main

sys.exit(main())
