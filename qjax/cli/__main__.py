"""`python -m qjax.cli`: the `qjax` command."""

import sys

from qjax.cli.main import main

sys.exit(main())
