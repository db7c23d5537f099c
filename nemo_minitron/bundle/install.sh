#!/bin/sh
# Checks this bundle and installs nemo-minitron from it. Uses no network.
#
#   ./install.sh                          install into .venv in this folder
#   ./install.sh --verify                 only check the files
#   ./install.sh --accept-unlisted        accept files in this folder that are not part of the bundle, such as runs/
#   PYTHON=/usr/bin/python3.11 ./install.sh
#
# SHA256SUMS is part of the bundle: the check detects damaged and added files, but not a forged bundle. To detect that,
# compare the sha256 of the tar file with the one that `minitron bundle` printed.
set -eu
cd -- "$(dirname -- "$0")"
PYTHON=${PYTHON:-python3}
# Keep this folder off the import path of every Python started from here: -I for this script's, the variable for pip's.
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
        *) fail "unknown option $word; the options are --verify and --accept-unlisted" ;;
    esac
done

# First check the paths: a forged list may name devices or files outside of this folder, which sha256sum would read.
"$PYTHON" -I - "$accept_unlisted" <<'END' || exit 2
import os, re, stat, sys
def stop(what, paths=(), step="copy it and unpack it again"):
    shown = "".join("  %s\n" % ascii(path)[1:-1][:300] for path in sorted(paths)[:10])
    more = "  and %d more\n" % (len(paths) - 10) if len(paths) > 10 else ""
    sys.exit("error: %s\n%s%s  next: %s" % (what, shown, more, step))
def inside(name):
    return os.path.normpath(name) == name and not os.path.isabs(name) and name.split("/")[0] not in (".", "..", "-")
try:
    with open("SHA256SUMS", encoding="utf-8", errors="surrogateescape", newline="\n") as sums:
        lines = [re.fullmatch("[0-9a-f]{64}  ([^\0]+)\n", line) for line in sums]
except OSError as error:
    stop("SHA256SUMS cannot be read: %s" % error)
if not lines or not all(line and inside(line[1]) for line in lines):
    stop("SHA256SUMS is damaged: it is not a list of files of this bundle")
listed = {line[1] for line in lines} | {"SHA256SUMS"}
links, odd, unlisted = [], [], []
for folder, folders, files in os.walk("."):
    if folder == "." and ".venv" in folders and not os.path.islink(".venv"):
        folders.remove(".venv")  # the installation replaces it
    for name in files + [name for name in folders if os.path.islink(os.path.join(folder, name))]:
        path = os.path.normpath(os.path.join(folder, name))
        if os.path.islink(path) and any((found + "/").startswith(path + "/") for found in listed):
            links.append(path)
        elif path not in listed:
            unlisted.append(path)
        elif not stat.S_ISREG(os.lstat(path).st_mode):
            odd.append(path)
if links:
    stop("files of the bundle were replaced by links", links)
if odd:
    stop("these are not regular files", odd)
if unlisted and sys.argv[1] != "yes":
    stop("the folder contains files that are not part of the bundle", unlisted,
         "unpack the bundle into a new folder; if the files are yours, run ./install.sh --accept-unlisted")
END
echo "verifying the sha256 of $(wc -l < SHA256SUMS) files"
sha256sum --check --strict --quiet SHA256SUMS </dev/null \
    || fail "the files named above are damaged: copy the bundle and unpack it again"
if [ "$verify_only" = yes ]; then
    echo "ok"
    exit 0
fi

minitron=minitron wheels=no
if [ -d wheels/core ]; then wheels=yes; fi
# The version that made the bundle; then the recipes, one per line, each with the recipes whose outputs it reads.
listed=$("$PYTHON" -I - "$wheels" <<'END'
import json, platform, sys
try:
    with open("manifest.json", encoding="utf-8") as file:
        manifest = json.load(file)
    recipes = [[recipe["file"], *recipe.get("waits_for", [])] for recipe in manifest["recipes"]]
    if not all(name.isprintable() and name and name[0] not in "-/" for names in recipes for name in names):
        raise ValueError("the file name of a recipe is not allowed")
    version = manifest.get("nemo_minitron", "")
    if not version.isprintable():
        raise ValueError("the version is not allowed")
    made = {key: str(manifest["target"][key])[:99] for key in ("system", "machine", "python")} if sys.argv[1] == "yes" else {}
except Exception as error:
    sys.exit("error: manifest.json is damaged: %s: %s" % (type(error).__name__, ascii(str(error))[1:-1][:300]))
here = {"system": platform.system(), "machine": platform.machine(), "python": "%d.%d" % sys.version_info[:2]}
wrong = ["the bundle is for %s %s, this is %s" % (key, ascii(made[key])[1:-1], here[key]) for key in made if here[key] != made[key]]
if wrong:
    sys.exit("error: %s\n  next: PYTHON=/path/to/python%s ./install.sh, or make a bundle for this machine"
             % ("; ".join(wrong), ascii(made["python"])[1:-1]))
sys.stdout.reconfigure(encoding="utf-8")
print(version)
for name, *others in recipes:
    print(name + ("\t" + ", ".join(others) if others else ""))
END
) || exit 2
made_by=$(printf '%s\n' "$listed" | sed -n 1p)
recipes=$(printf '%s\n' "$listed" | sed 1d)
tab=$(printf '\t')
if [ "$wheels" = yes ]; then
    # Install only from this folder, whatever the configuration of pip on this machine.
    export PIP_CONFIG_FILE=/dev/null PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1
    unset PIP_FIND_LINKS PIP_CONSTRAINT PIP_REQUIREMENT
    minitron=.venv/bin/minitron
    echo "installing into $PWD/.venv"
    if [ -L .venv ]; then fail ".venv is a symbolic link: remove it"; fi
    "$PYTHON" -I -m venv --clear .venv \
        || fail "the virtual environment could not be created; Debian and Ubuntu need the package python3-venv"
    .venv/bin/python -I -m pip install --quiet --no-index --no-deps --only-binary :all: --require-hashes \
        --find-links wheels/core --requirement wheels/core/requirements.txt \
        || fail "pip could not install the wheels; see its message above"
    if [ -d wheels/aligner ]; then
        "$minitron" env aligner --find-links wheels/aligner --find-links wheels/core
    fi
else
    command -v minitron >/dev/null || fail "the bundle has no wheels, and the command minitron is not on the PATH"
    if [ -n "$made_by" ]; then
        found=$(minitron version </dev/null) || fail "minitron version, of the minitron on the PATH, failed"
        [ "$found" = "$made_by" ] \
            || fail "the bundle is of nemo-minitron $made_by, and the minitron on the PATH is $found: install $made_by"
    fi
fi

# Check every recipe from this folder, where it will be run, unless the outputs that it reads are still to be made.
printf '%s\n' "$recipes" | while IFS= read -r recipe; do
    case $recipe in
        '') ;;
        *"$tab"*) printf 'not checked: %s, which reads outputs of %s\n' "${recipe%%"$tab"*}" "${recipe#*"$tab"}" ;;
        *) "$minitron" check "$recipe" </dev/null ;;
    esac
done
"$PYTHON" -I - "$PWD" "$minitron" "$recipes" <<'END'
import shlex, sys
sys.stdout.reconfigure(errors="backslashreplace")
folder, minitron = map(shlex.quote, sys.argv[1:3])
print("ready: cd %s" % folder)
for line in sys.argv[3].splitlines():
    recipe, _, others = line.partition("\t")
    print("       %s run %s%s" % (minitron, shlex.quote(recipe), "   # after %s" % others if others else ""))
END
