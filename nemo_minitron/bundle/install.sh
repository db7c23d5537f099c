#!/bin/sh
# Checks this bundle and installs nemo-minitron from it. Uses no network.
#
#   ./install.sh                          into .venv beside this file
#   ./install.sh --verify                 only compare every file with its sha256
#   PYTHON=/usr/bin/python3.11 ./install.sh
set -eu
cd -- "$(dirname -- "$0")"
PYTHON=${PYTHON:-python3}

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

echo "comparing $(wc -l < SHA256SUMS) files with their sha256"
sha256sum --check --strict --quiet SHA256SUMS \
    || fail "the bundle is damaged, in the files named above: copy it and unpack it again"
if [ "${1:-}" = --verify ]; then
    echo "ok"
    exit 0
fi

minitron=minitron
if [ -d wheels/core ]; then
    "$PYTHON" - <<'END' || exit 2
import json, platform, sys
made = json.load(open("manifest.json", encoding="utf-8"))["target"]
here = {"system": platform.system(), "machine": platform.machine(), "python": "%d.%d" % sys.version_info[:2]}
wrong = ["the bundle is for %s %s, this is %s" % (key, made[key], here[key]) for key in here if here[key] != made[key]]
if wrong:
    sys.exit("error: %s\n  next: PYTHON=/path/to/python%s ./install.sh, or make a bundle for this machine"
             % ("; ".join(wrong), made["python"]))
END
    # Only what is in this folder counts, whatever pip is told on this machine.
    export PIP_CONFIG_FILE=/dev/null PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1
    minitron=.venv/bin/minitron
    echo "installing into $PWD/.venv"
    "$PYTHON" -m venv .venv || fail "no virtual environment could be made; Debian and Ubuntu need the package python3-venv"
    .venv/bin/python -m pip install --quiet --no-index --no-deps wheels/core/*.whl \
        || fail "pip could not install the wheels: its message is above"
    if [ -d wheels/aligner ]; then
        "$minitron" env aligner --find-links wheels/aligner --find-links wheels/core
    fi
else
    command -v minitron >/dev/null || fail "the bundle has no wheels, and there is no minitron on the PATH"
fi

# Every recipe, as it will be run: from this folder.
"$PYTHON" -c 'import json
for recipe in json.load(open("manifest.json", encoding="utf-8"))["recipes"]:
    print(recipe["file"])' | while IFS= read -r recipe; do
    "$minitron" check "$recipe" </dev/null
done
"$PYTHON" - "$PWD" "$minitron" <<'END'
import json, shlex, sys
folder, minitron = map(shlex.quote, sys.argv[1:])
print("ready: cd %s" % folder)
for recipe in json.load(open("manifest.json", encoding="utf-8"))["recipes"]:
    print("       %s run %s" % (minitron, shlex.quote(recipe["file"])))
END
