"""`python -m mdpgrpo_fast.report RUN_DIR`: write the page of a run into its directory."""

import sys

from .page import main

if __name__ == "__main__":
    sys.exit(main())
