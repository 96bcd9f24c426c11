"""``python -m polopt``."""

from __future__ import annotations

import sys

from polopt.cli.main import main

sys.exit(main())
