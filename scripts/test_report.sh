#!/usr/bin/env bash
# Tests the pages of `vidcompress report` in Chromium: no message on the console, no request, keyboard, names for screen
# readers, contrast, a phone's width, print. Leaves the pages and pictures of them to be looked at.
#
# usage: scripts/test_report.sh [FOLDER]     (for the pages and pictures; default build/report)
#
# Needs chromium and chromedriver; on Debian and Ubuntu: apt-get install chromium chromium-driver
# Variables: VENV (.venv), made if missing. Installs selenium into it.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
for program in chromium chromedriver; do
    if ! command -v "$program" > /dev/null; then
        echo "$program is not installed; on Debian and Ubuntu: apt-get install chromium chromium-driver" >&2
        exit 2
    fi
done
venv=$(realpath -m "${VENV:-.venv}")
if [ ! -x "$venv/bin/python" ]; then
    make VENV="$venv" "$venv/.installed-dev"
fi
"$venv/bin/python" -c "import selenium" 2> /dev/null || "$venv/bin/python" -m pip install -c constraints.txt "selenium>=4.40"
VIDCOMPRESS_REPORT_SHOTS=$(realpath -m "${1:-build/report}")
export VIDCOMPRESS_REPORT_SHOTS
"$venv/bin/python" -m pytest tests/report_browser
echo "pages and pictures: $VIDCOMPRESS_REPORT_SHOTS"
