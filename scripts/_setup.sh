# Sourced by the scripts beside it. Afterwards the working directory is the repository's root and
# `python`, `cptq` and the tools are those of a virtual environment in .venv (or $CPTQ_VENV), made
# or brought up to date where pyproject.toml, constraints.txt or the C library have changed. $PYTHON
# names the interpreter to make it with (default python3).
# shellcheck shell=bash

# `scripts/NAME --help` prints the comment at the head of the script.
case "${1:-}" in
-h | --help)
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
venv=${CPTQ_VENV:-$PWD/.venv}
stamp=$venv/.installed

# Everything that decides what the environment must hold; the path, as the install is editable.
wanted() {
    printf '%s\n' "$PWD"
    cat pyproject.toml constraints.txt setup.py cptq/inference/native/*.[ch]
}

create_environment() {
    local base=${PYTHON:-python3}
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "cptq needs Python 3.11 or newer; name one with PYTHON=/path/to/python" >&2
        return 1
    }
    "$base" -m venv "$venv"
}

# torch first: it is the largest by far, and what follows then finds it in place. Byte code is left to
# the first import, which compiles what is used: half the time of compiling everything.
install_packages() {
    local install=("$venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check
        --constraint constraints.txt)
    "${install[@]}" torch && "${install[@]}" --editable '.[dev]'
}

if ! { wanted | cmp -s - "$stamp" && "$venv/bin/python" -c ''; } 2>/dev/null; then
    echo "setting up $venv (some minutes the first time)" >&2
    started=$SECONDS
    rm -f "$stamp"
    "$venv/bin/python" -c '' 2>/dev/null || create_environment || exit 1
    install_packages >&2 || { echo "cannot install the packages: see above" >&2 && exit 1; }
    wanted >"$stamp"
    echo "set up in $((SECONDS - started)) s" >&2
fi
export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
# Without cached byte code every process compiles torch and transformers anew: 19 s instead of 7.
unset PYTHONDONTWRITEBYTECODE
