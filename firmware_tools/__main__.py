"""`python -m firmware_tools`: the command `aiflow`, for when its script is not on the path."""

import sys

from firmware_tools.cli import main

sys.exit(main())
