"""`python -m pyfuse` is the `pyfuse` command."""

import sys

from pyfuse.cli import main

if __name__ == "__main__":
    sys.exit(main())
