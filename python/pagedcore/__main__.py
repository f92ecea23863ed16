"""``python -m pagedcore``: the command line."""

from __future__ import annotations

import sys

from pagedcore.cli import main

sys.exit(main())
