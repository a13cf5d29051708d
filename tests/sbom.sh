#!/usr/bin/env bash
# Writes the software bill of materials of .venv (CycloneDX, JSON) and checks it: bash tests/sbom.sh [FILE]
# FILE is results/sbom.json if left out. The tool that writes it is the extra sbom, in an environment of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
file=${1:-results/sbom.json}

work=$(mktemp -d --tmpdir moempi-sbom.XXXXXX)
trap 'rm -rf "$work"' EXIT
.venv/bin/python -m venv "$work"
"$work/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: \
    -r jobs/lock/moempi.txt -r jobs/lock/sbom.txt
mkdir -p "$(dirname "$file")"
# It checks the result against the schema of CycloneDX.
"$work/bin/cyclonedx-py" environment --pyproject pyproject.toml --output-reproducible --output-file "$file" .venv/bin/python

.venv/bin/python - "$file" <<'END'
import json
import sys
from importlib.metadata import distributions
from pathlib import Path

bill = json.loads(Path(sys.argv[1]).read_text())
found = {part["name"]: part for part in [bill["metadata"]["component"], *bill["components"]]}
missing = sorted({installed.metadata["Name"] for installed in distributions()} - found.keys())
if missing:
    sys.exit(f"sbom: {sys.argv[1]} lacks {', '.join(missing)}")
silent = sorted(name for name, part in found.items() if not part.get("licenses"))
print(f"sbom: {len(found)} packages in {sys.argv[1]}; without a licence in their metadata: {', '.join(silent) or 'none'}")
END
