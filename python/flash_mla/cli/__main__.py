"""`python -m flash_mla.cli`: the same as the command `flash-mla`."""

import sys

from flash_mla.cli import main

sys.exit(main())
