"""``python -m compress_search`` is the command ``compress-search``."""

import sys

from compress_search.cli import main

sys.exit(main())
