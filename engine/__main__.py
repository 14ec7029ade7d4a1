"""``python -m balcaprl``: the command line, as ``balcaprl`` starts it."""

import sys

from balcaprl.cli import main

sys.exit(main())
