#!/usr/bin/env bash
# Publishes the layer's zip in one or several regions; all options: --help
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
PYTHONPATH=$root exec "$python" -m layer.publish "$@"
