#!/usr/bin/env bash
# Makes the virtual environment that every make target uses: $VENV, from $PYTHON. Safe to run again.
set -euo pipefail
cd "$(dirname "$0")/.."

base=${PYTHON:-python3}
venv=${VENV:-.venv}
python=$venv/bin/python

stop() {
    echo "setup_env: $*" >&2
    exit 1
}

"$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || stop "got '$base', need Python 3.10 or newer, try make PYTHON=python3.12"

if [ ! -x "$python" ]; then
    # Some systems ship venv without pip's bundle; the interpreter's own pip then installs from outside.
    "$base" -m venv "$venv" >/dev/null 2>&1 || "$base" -m venv --without-pip --clear "$venv"
    # A torch that the interpreter already has was chosen for this machine's driver, so it is reused. --system-site-packages
    # would miss it where the interpreter itself belongs to a virtual environment; its search path works in both cases.
    if "$base" -c 'import torch' 2>/dev/null; then
        "$base" - "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base-interpreter.pth" <<'EOF'
import sys

folders = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
with open(sys.argv[1], "w") as file:
    file.writelines(f"import site; site.addsitedir({folder!r})\n" for folder in folders)
EOF
        # All that is needed may be there already: without a network, say so soon.
        export PIP_RETRIES=${PIP_RETRIES:-1}
    fi
fi

export PIP_DISABLE_PIP_VERSION_CHECK=1
if "$python" -m pip --version >/dev/null 2>&1; then
    pip=("$python" -m pip)
else
    pip=("$base" -m pip --python "$python")
fi

has_gpu() {
    [ -e /dev/kfd ] || { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }
}

# Without a GPU the version is fixed, so that every such machine, CI's too, tests the same torch. With one, the newest is
# taken together with the Triton that it names.
if ! "$python" -c 'import torch' 2>/dev/null; then
    torch=${TORCH:-}
    if [ -z "$torch" ] && ! has_gpu; then torch=torch==2.13.0; fi
    if [ -n "$torch" ]; then "${pip[@]}" install -q "$torch" || stop "could not install $torch"; fi
fi

if "${pip[@]}" install -q -e '.[dev]'; then
    exit 0
fi

# No registry in reach: run from the sources if all that the demo and the tests import is there (ruff and mypy are not asked for).
"$python" -c 'import torch, triton, numpy, rich, matplotlib, pytest, xdist, hypothesis' ||
    stop "could not install flashtile's dependencies, and the module named above is missing"
echo "setup_env: pip could not install; running from the sources with the packages that '$base' has"
pwd >"$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/flashtile-sources.pth"
cat >"$venv/bin/flashtile" <<EOF
#!$("$python" -c 'import sys; print(sys.executable)')
import sys

from flashtile.cli import main

sys.exit(main())
EOF
chmod +x "$venv/bin/flashtile"
