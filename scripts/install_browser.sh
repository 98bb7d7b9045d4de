#!/usr/bin/env bash
# Chromium and its driver, for tests/browser: Debian's packages, installed as root, or in CI with sudo that asks nothing.
# Where that cannot be, it says so, and the tests are skipped (in CI they fail).
set -euo pipefail

there() { command -v "$1" >/dev/null; }

if { there chromium || there chromium-browser || there google-chrome; } && there chromedriver; then exit 0; fi
root=()
[ "$(id -u)" -eq 0 ] || { [ -n "${CI:-}" ] && root=(sudo -n); }
apt() { "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq "$@" >/dev/null; }
if there apt-get && { [ "$(id -u)" -eq 0 ] || [ ${#root[@]} -gt 0 ]; }; then
    echo "installing Chromium for the browser tests"
    if apt update && apt install -y --no-install-recommends chromium chromium-driver; then exit 0; fi
fi
echo "no Chromium with its driver here: the report is not tested in a browser"
