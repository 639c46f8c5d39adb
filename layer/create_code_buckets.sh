#!/usr/bin/env bash
# Creates the S3 buckets, one a region, from which the layer is published; all options: --help
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
PYTHONPATH=$root exec "$python" -m layer.buckets "$@"
