#!/usr/bin/env bash
# Installs the Debian packages that ahead-of-time compilation and some tests use. Without root or sudo it says what is
# missing and goes on: what needs a missing package then skips, or falls back to portable kernels, and says why.
set -euo pipefail
missing=()
command -v g++ >/dev/null || missing+=(g++)
python3 -c 'import sysconfig, pathlib, sys; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' \
  || missing+=(python3-dev)
python3 -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3-venv)
compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || missing+=(postgresql)
command -v chromium >/dev/null || missing+=(chromium)
[[ ${#missing[@]} -eq 0 ]] && exit 0
if [[ "${SKIP_SYSTEM_PACKAGES:-}" == 1 ]] || ! command -v apt-get >/dev/null; then
  echo "system packages not installed: ${missing[*]}" >&2
  exit 0
fi
as_root=()
if [[ $(id -u) -ne 0 ]]; then
  if sudo -n true 2>/dev/null; then
    as_root=(sudo -n)
  else
    echo "system packages not installed (neither root nor password-less sudo): ${missing[*]}" >&2
    exit 0
  fi
fi
echo "installing system packages: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
if ! { "${as_root[@]}" apt-get update && "${as_root[@]}" apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
  tail -5 "$log" >&2
  echo "system packages could not be installed: ${missing[*]}" >&2
fi
rm -f "$log"
