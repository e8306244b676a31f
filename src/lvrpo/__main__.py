"""``python -m lvrpo``."""

import sys

from lvrpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
