#!/usr/bin/env bash
# Regenerates gen/ from proto/. With --check it regenerates into the tree and fails when git sees a difference.
set -euo pipefail
cd "$(dirname "$0")/.."
python tools/render_validate_proto.py third_party
# The plugins chat on standard error: worth reading when they fail only.
chatter=$(mktemp)
trap 'rm -f "$chatter"' EXIT
generate() {
  buf generate "$@" 2>"$chatter" || { cat "$chatter" >&2; exit 1; }
}
generate
generate --template buf.gen.client.yaml
touch gen/esper/v1/py.typed gen/buf/validate/py.typed
if [[ "${1:-}" == "--check" ]]; then
  drift=$(git status --porcelain -- gen third_party)
  if [[ -n "$drift" ]]; then
    printf 'gen/ does not match proto/: run "make gen" and commit\n%s\n' "$drift" >&2
    exit 1
  fi
fi
