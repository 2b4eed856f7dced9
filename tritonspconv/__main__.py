"""``python -m tritonspconv`` is the command ``tritonspconv``."""

import sys

from tritonspconv.cli import main

if __name__ == "__main__":
    sys.exit(main())
