"""``python -m fabric`` is the command ``fabric``."""

import sys

from ._cli import main

if __name__ == "__main__":
    sys.exit(main())
