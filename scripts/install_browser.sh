#!/usr/bin/env bash
# Chromium and its driver, for tests/browser, on Debian or Ubuntu as root or with sudo that asks nothing.
# Where that cannot be, it says so and the tests are skipped (in CI they fail).
set -euo pipefail

there() { command -v "$1" >/dev/null; }

if { there chromium || there chromium-browser || there google-chrome; } && there chromedriver; then exit 0; fi
[ "$(id -u)" -eq 0 ] && root=() || root=(sudo -n)
if ! there apt-get || ! "${root[@]}" true 2>/dev/null; then
    echo "no Chromium here, and no way to install it: the report is not tested in a browser"
    exit 0
fi
echo "installing Chromium for the browser tests"
"${root[@]}" apt-get update -qq
install=("${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends)
"${install[@]}" chromium chromium-driver >/dev/null || "${install[@]}" chromium-browser chromium-chromedriver >/dev/null
