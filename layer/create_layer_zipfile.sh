#!/usr/bin/env bash
# Builds the Lambda layer's zip beside this script; all options: ./create_layer_zipfile.sh --help
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
PYTHONPATH=$root exec "$python" -m layer.build "$@"
