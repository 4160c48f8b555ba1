#!/usr/bin/env bash
# Run the tests in the environment of launch/demo.sh, with what tests need besides.
# Arguments are passed on to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh" test
SECONDS=0
python -m pytest "$@"
echo "The tests took $((SECONDS / 60)) min $((SECONDS % 60)) s."
