"""`python -m moempi` is the command `moempi`."""

import sys

from moempi.cli import main

sys.exit(main())
