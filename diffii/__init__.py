__version__ = "0.2.0"

import os as _os

# OpenMP's threads spin while they wait, which stalls every other process on the
# machine. A thousand turns are enough; it must be said before torch is loaded.
_os.environ.setdefault('GOMP_SPINCOUNT', '1000')
