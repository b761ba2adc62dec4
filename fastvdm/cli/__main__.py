"""``python -m fastvdm.cli``, which ``accelerate launch -m`` needs."""

from __future__ import annotations

import sys

from fastvdm.cli import main

sys.exit(main())
