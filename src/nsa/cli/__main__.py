"""`python -m nsa.cli COMMAND ...`, and `torchrun --nproc-per-node N -m nsa.cli COMMAND ...` for several processes."""

import sys

from nsa.cli import main

if __name__ == "__main__":
    sys.exit(main())
