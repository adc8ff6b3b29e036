"""`python -m aquila_jax.cli`, where the console script is not on the path."""

import sys

from aquila_jax.cli import main

sys.exit(main())
