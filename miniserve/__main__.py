"""`python -m miniserve`: the same as the command `miniserve`."""

import sys

from miniserve.cli.main import main

sys.exit(main())
