# Sourced by the other scripts: prepares .venv with the versions of constraints.txt.
#
#   source scripts/env.sh
#   prepare_env          # what a run needs
#   prepare_env dev      # and what the tests and checks need
#
# Installs only when there is something to do: .venv/lsp_ray.stamp remembers what was installed from which files.

set -euo pipefail

repo_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv_python="$repo_root/.venv/bin/python"
env_stamp="$repo_root/.venv/lsp_ray.stamp"
new_enough='import sys; sys.exit(sys.version_info < (3, 11))'

say() { printf 'lsp_ray: %s\n' "$*" >&2; }

fail() {
    say "$*"
    exit 1
}

find_python() {
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11 python; do
        if command -v "$name" >/dev/null && "$name" -c "$new_enough" 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    fail "no Python 3.11 or newer on the PATH; install one (Debian, Ubuntu: apt install python3 python3-venv)"
}

make_venv() {
    local base
    base="$(find_python)"
    say "making .venv with $("$base" --version)"
    if ! "$base" -c 'import ensurepip, venv' 2>/dev/null; then
        fail "$base has no venv module with pip; install it (Debian, Ubuntu: apt install python3-venv)"
    fi
    "$base" -m venv "$repo_root/.venv"
}

# What was asked for, as one line: the files' checksum and the folder, which an editable install points to.
env_key() {
    printf '%s %s\n' "$(cat "$repo_root/pyproject.toml" "$repo_root/constraints.txt" | cksum)" "$repo_root"
}

is_current() { # $1: extras
    local have_extras="" have_key=""
    [[ -x "$venv_python" && -f "$env_stamp" ]] || return 1
    { read -r have_extras && read -r have_key; } <"$env_stamp" || return 1
    [[ "$have_key" == "$(env_key)" && ("$have_extras" == "extras:$1" || "$have_extras" == "extras:dev") ]]
}

prepare_env() { # $1: extras to install, none by default
    local extras="${1:-}" target
    target="$repo_root${extras:+[$extras]}"
    if is_current "$extras"; then
        return
    fi
    [[ -x "$venv_python" ]] || make_venv
    "$venv_python" -c "$new_enough" || fail ".venv has a Python older than 3.11; remove .venv and run this again"
    "$venv_python" -m pip --version >/dev/null 2>&1 || fail ".venv has no pip; remove .venv and run this again"
    say "installing lsp_ray${extras:+[$extras]} with the versions of constraints.txt into .venv (some minutes at first)"
    rm -f "$env_stamp"
    "$venv_python" -m pip install -qq --disable-pip-version-check -c "$repo_root/constraints.txt" -e "$target" ||
        fail "pip could not install the dependencies; its message is above"
    printf 'extras:%s\n%s\n' "$extras" "$(env_key)" >"$env_stamp"
    say "environment ready"
}
