#!/bin/sh
# Checks this bundle and installs nemo-minitron from it. Uses no network.
#
#   ./install.sh                          into .venv beside this file
#   ./install.sh --verify                 only check the files
#   ./install.sh --accept-unlisted        also where there are files that the bundle did not bring, such as runs/
#   PYTHON=/usr/bin/python3.11 ./install.sh
#
# SHA256SUMS comes with the bundle: the check finds damage and additions, not a bundle that somebody else has made.
# For that, compare the sha256 of the tar file with the one that `minitron bundle` printed.
set -eu
cd -- "$(dirname -- "$0")"
PYTHON=${PYTHON:-python3}
# No Python that is started from here imports from this folder: not this script's (-I), and not those of pip.
export PYTHONSAFEPATH=1

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

verify_only=no accept_unlisted=no
for word in "$@"; do
    case $word in
        --verify) verify_only=yes ;;
        --accept-unlisted) accept_unlisted=yes ;;
        *) fail "unknown option $word; there are --verify and --accept-unlisted" ;;
    esac
done

echo "comparing $(wc -l < SHA256SUMS) files with their sha256"
sha256sum --check --strict --quiet SHA256SUMS \
    || fail "the bundle is damaged, in the files named above: copy it and unpack it again"
"$PYTHON" -I - "$accept_unlisted" <<'END' || exit 2
import os, sys
def tail(line):  # as sha256sum reads it
    return line.rstrip("\n").split("  ", 1)[1]
with open("SHA256SUMS", encoding="utf-8", errors="surrogateescape") as sums:
    listed = {os.path.normpath(tail(line)) for line in sums} | {"SHA256SUMS"}
links, unlisted = [], []
for folder, folders, files in os.walk("."):
    if folder == "." and ".venv" in folders and not os.path.islink(".venv"):
        folders.remove(".venv")  # made anew by the installation
    for name in files + [name for name in folders if os.path.islink(os.path.join(folder, name))]:
        path = os.path.normpath(os.path.join(folder, name))
        if os.path.islink(path) and any((found + "/").startswith(path + "/") for found in listed):
            links.append(path)
        elif path not in listed:
            unlisted.append(path)
def stop(what, paths, step):
    shown = "".join("  %s\n" % ascii(path)[1:-1] for path in sorted(paths)[:10])
    more = "  and %d more\n" % (len(paths) - 10) if len(paths) > 10 else ""
    sys.exit("error: %s\n%s%s  next: %s" % (what, shown, more, step))
if links:
    stop("links stand in the place of files of the bundle", links, "copy it and unpack it again")
if unlisted and sys.argv[1] != "yes":
    stop("files that the bundle did not bring are in its folder", unlisted,
         "unpack it into a new folder; or, where they are yours: ./install.sh --accept-unlisted")
END
if [ "$verify_only" = yes ]; then
    echo "ok"
    exit 0
fi

minitron=minitron
if [ -d wheels/core ]; then
    "$PYTHON" -I - <<'END' || exit 2
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
    unset PIP_FIND_LINKS PIP_CONSTRAINT PIP_REQUIREMENT
    minitron=.venv/bin/minitron
    echo "installing into $PWD/.venv"
    if [ -L .venv ]; then fail ".venv is a link: remove it"; fi
    "$PYTHON" -I -m venv --clear .venv \
        || fail "no virtual environment could be made; Debian and Ubuntu need the package python3-venv"
    .venv/bin/python -I -m pip install --quiet --no-index --no-deps --only-binary :all: --require-hashes \
        --find-links wheels/core --requirement wheels/core/requirements.txt \
        || fail "pip could not install the wheels: its message is above"
    if [ -d wheels/aligner ]; then
        "$minitron" env aligner --find-links wheels/aligner --find-links wheels/core
    fi
else
    command -v minitron >/dev/null || fail "the bundle has no wheels, and there is no minitron on the PATH"
fi

# Every recipe, as it will be run: from this folder.
"$PYTHON" -I -c 'import json
for recipe in json.load(open("manifest.json", encoding="utf-8"))["recipes"]:
    print(recipe["file"])' | while IFS= read -r recipe; do
    "$minitron" check "$recipe" </dev/null
done
"$PYTHON" -I - "$PWD" "$minitron" <<'END'
import json, shlex, sys
folder, minitron = map(shlex.quote, sys.argv[1:])
print("ready: cd %s" % folder)
for recipe in json.load(open("manifest.json", encoding="utf-8"))["recipes"]:
    print("       %s run %s" % (minitron, shlex.quote(recipe["file"])))
END
