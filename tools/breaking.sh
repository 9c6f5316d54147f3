#!/usr/bin/env bash
# Compares the contracts with the last released ones: the newest tag v*, else the first commit that has them. In a checkout
# without history (a tarball, a shallow clone) there is nothing to compare with, which is said.
set -euo pipefail
cd "$(dirname "$0")/.."
base=$(git describe --tags --abbrev=0 --match 'v*' 2>/dev/null || git log --diff-filter=A --format=%H -- buf.yaml 2>/dev/null | tail -1)
if [[ -z "$base" ]] || ! git cat-file -e "$base:buf.yaml" 2>/dev/null; then
  echo "buf breaking: no earlier contracts in this checkout's history; skipped" >&2
  exit 0
fi
archive=$(mktemp -d)
trap 'rm -rf "$archive"' EXIT
git archive "$base" buf.yaml proto third_party | tar -x -C "$archive"
buf breaking --against "$archive"
