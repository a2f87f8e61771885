"""`python -m zimage`: the command, where its script is not on the path."""

import sys

from zimage.cli import main

sys.exit(main())
