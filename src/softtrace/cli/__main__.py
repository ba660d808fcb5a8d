"""``python -m softtrace.cli``."""

import sys

from softtrace.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
