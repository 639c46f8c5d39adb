"""Where the repository is and where everything generated goes. Imported by every other package."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = (ROOT / os.environ.get("BUILD_DIR", "build")).resolve()
