#!/usr/bin/env bash
# Run this table: run.sh [--size mini|paper] [--data FOLDER] [--methods ...] [--seeds ...]; see scripts/run_table.py.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec python3 "$here/../../scripts/run_table.py" "$here" "$@"
