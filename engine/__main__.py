"""``python -m balcaprl``: starts the same command line as ``balcaprl``."""

import sys

from balcaprl.cli.main import main

sys.exit(main())
