#!/bin/sh
# Install or upgrade dicom-node as a systemd service. Safe to run again: an existing configuration is never changed.
#
#   /opt/dicom-node/releases/VERSION/   one virtual environment a release; older ones stay for a way back
#   /opt/dicom-node/venv, engines       links to the release in use
#   /etc/dicom-node/config.yaml         yours (config.yaml.shipped beside it is the one of this release)
#   /var/lib/dicom-node                 the store root: acknowledged instances, ledger, outputs, site models
#   /etc/systemd/system/dicom-node*.service
set -eu
umask 022  # the service reads what root installs here

usage() {
    cat <<'TEXT'
usage: install.sh [--source PATH] [--prefix DIR] [--split] [--dry-run] [--pip-args ARGS]
  --source PATH    checkout, sdist or wheel to install (default: the checkout this script lies in)
  --prefix DIR     install under DIR instead of /: no user, no systemctl, no ownership
  --split          two units (listen, work) instead of one
  --dry-run        say what would be done
  --pip-args ARGS  passed on to pip install, for example "--no-index --find-links wheels"
TEXT
}

source=$(cd "$(dirname "$0")/.." && pwd)
prefix="" split=no dry=no pip_args=""
while [ $# -gt 0 ]; do
    case "$1" in
        --source) source=$2; shift 2 ;;
        --prefix) prefix=${2%/}; shift 2 ;;
        --split) split=yes; shift ;;
        --dry-run) dry=yes; shift ;;
        --pip-args) pip_args=$2; shift 2 ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done

say() { printf '%s\n' "$*"; }
fail() { printf 'install.sh: %s\n' "$*" >&2; exit 1; }
run() { # run COMMAND ARGS…, or only say it
    if [ "$dry" = yes ]; then say "would run: $*"; else "$@"; fi
}

deploy=$(cd "$(dirname "$0")" && pwd)
opt=$prefix/opt/dicom-node etc=$prefix/etc/dicom-node var=$prefix/var/lib/dicom-node units=$prefix/etc/systemd/system
real=no
[ -n "$prefix" ] || real=yes

# --- what must be there
python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "python3 is needed"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or later is needed"
"$python" -c 'import venv, ensurepip' 2>/dev/null || fail "python3-venv is needed (apt-get install python3-venv)"
[ -e "$source" ] || fail "nothing at $source"
if [ "$real" = yes ] && [ "$dry" = no ]; then
    [ "$(id -u)" -eq 0 ] || fail "root is needed (or --prefix DIR)"
    command -v systemctl >/dev/null || fail "systemd is needed (or --prefix DIR)"
fi

# --- user and folders
if [ "$real" = yes ] && ! id dicom-node >/dev/null 2>&1; then
    run useradd --system --user-group --home-dir /var/lib/dicom-node --no-create-home --shell /usr/sbin/nologin dicom-node
fi
run mkdir -p "$opt/releases" "$etc" "$units"
[ -d "$var" ] || run mkdir -p "$var"
run chmod 0700 "$var"
run chmod 0750 "$etc"
if [ "$real" = yes ]; then
    run chown dicom-node:dicom-node "$var"
    run chgrp dicom-node "$etc"
fi

# --- the release: a new environment is complete before the link moves, so a failed download changes nothing
install_release() {
    new=$(mktemp -d "$opt/releases/.new.XXXXXX")
    trap 'rm -rf "$new"' EXIT
    "$python" -m venv "$new"
    # shellcheck disable=SC2086  # several arguments are meant
    "$new/bin/python" -m pip install --quiet --disable-pip-version-check $pip_args "$source"
    version=$("$new/bin/python" -c 'from importlib.metadata import version; print(version("dicom-node"))')
    stamp=$(date -u +%Y%m%dT%H%M%SZ)
    release=$opt/releases/$version-$stamp
    # The scripts of a virtual environment name their interpreter by its full path.
    grep -rlZ "$new" "$new/bin" "$new/pyvenv.cfg" | xargs -0 -r sed -i "s|$new|$release|g"
    chmod 0755 "$new"
    mv "$new" "$release"
    trap - EXIT
    shipped=$(cd / && "$release/bin/python" -c '
import importlib.util
print(importlib.util.find_spec("dicom_node").submodule_search_locations[0] + "/_shipped")')
    [ -d "$shipped/engines" ] || fail "$shipped/engines is missing in the release"
    ln -sfn "$shipped/engines" "$opt/engines.new" && mv -T "$opt/engines.new" "$opt/engines"
    ln -sfn "$release" "$opt/venv.new" && mv -T "$opt/venv.new" "$opt/venv"
    say "release $version-$stamp"
}
if [ "$dry" = yes ]; then say "would install $source into $opt/releases and link $opt/venv to it"; else install_release; fi

# --- configuration: ours the first time, never again
write_config() {
    shipped=$(readlink -f "$opt/engines")/../config.yaml
    cp "$shipped" "$etc/config.yaml.shipped"
    [ -e "$etc/config.yaml" ] && { say "kept $etc/config.yaml"; return; }
    sed -e 's|^  root: var |  root: /var/lib/dicom-node |' \
        -e 's|^  path: \[engines\] |  path: [/opt/dicom-node/engines] |' "$shipped" >"$etc/config.yaml.new"
    grep -q '^  root: /var/lib/dicom-node' "$etc/config.yaml.new" || fail "the shipped config.yaml has another shape"
    grep -q '^  path: \[/opt/dicom-node/engines\]' "$etc/config.yaml.new" || fail "the shipped config.yaml has another shape"
    chmod 0640 "$etc/config.yaml.new"
    [ "$real" = no ] || chgrp dicom-node "$etc/config.yaml.new"
    mv "$etc/config.yaml.new" "$etc/config.yaml"
    say "wrote $etc/config.yaml"
}
if [ "$dry" = yes ]; then say "would write $etc/config.yaml unless it exists"; else write_config; fi

# --- units
wanted="dicom-node.service" other="dicom-node-listen.service dicom-node-work.service"
[ "$split" = no ] || { wanted="dicom-node-listen.service dicom-node-work.service"; other="dicom-node.service"; }
for unit in $wanted; do
    run install -m 0644 "$deploy/systemd/$unit" "$units/$unit"
done
for unit in $other; do
    if [ -e "$units/$unit" ]; then
        [ "$real" = no ] || run systemctl disable --now "$unit"
        run rm -f "$units/$unit"
    fi
done
if [ "$real" = yes ]; then
    run systemctl daemon-reload
    # shellcheck disable=SC2086  # a list of units
    run systemctl enable $wanted
fi

say "next:"
say "  1. edit $etc/config.yaml: receive.host, receive.allow, deliver.destinations"
say "  2. sudo -u dicom-node $opt/venv/bin/dicom-node check --config $etc/config.yaml"
say "  3. systemctl restart $wanted"
