# Sourced by the other scripts: a virtual environment in .venv with the package and the extras named in "$1".
# Nothing is installed when pyproject.toml and the extras are what they were.
extras="$1"
python="${PYTHON:-python3}"
if [ ! -x .venv/bin/python ]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed ($python)"; exit 1; }
  "$python" -m venv .venv || { echo "python3-venv is needed: apt-get install python3-venv"; exit 1; }
fi
stamp="$(sha256sum pyproject.toml | cut -d' ' -f1) $extras"
if ! grep -qxF "$stamp" .venv/installed 2>/dev/null; then
  echo "installing dicom-node[$extras] into .venv …" >&2
  .venv/bin/python -m pip install -q --disable-pip-version-check -e ".[$extras]"
  echo "$stamp" >>.venv/installed
fi
