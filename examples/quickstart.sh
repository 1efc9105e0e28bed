#!/usr/bin/env bash
# Quantizes the bundled language model five ways and shows what each costs and saves.
#
#   command   bash examples/quickstart.sh [RESULTS FOLDER]
#   needs     Python >= 3.11 and a package index (set PYTHON to choose the interpreter)
#   hardware  any CPU; written for 2 cores and 4 GB of memory
#   minutes   2 to install, then 2 on two cores
#   result    a table, a sample of text, and quickstart-results/: table.md, table.json,
#             quality.png and the quantized models
#
# It builds its own environment, .venv-quickstart, and touches nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "quickstart: '$python' is missing or older than Python 3.11;" \
        "set PYTHON to a newer interpreter" >&2
    exit 2
fi

venv=.venv-quickstart
if [[ ! -x "$venv/bin/python" ]]; then
    "$python" -m venv "$venv"
fi
echo "Installing qjax into $venv ..."
"$venv/bin/pip" install --quiet --disable-pip-version-check --editable '.[plot]'

exec "$venv/bin/python" examples/quickstart.py --results "${1:-quickstart-results}"
