#!/usr/bin/env bash
# Balanced gating on questions of one kind only, which crowd few experts: bash jobs/balance.sh [RANKS]
# Runs the shipped model with each balance.mode and prints imbalance, moved choices, exact matches and quality cost.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ranks=${1:-2}

bash jobs/setup.sh local convert
# shellcheck source=jobs/env.sh
source jobs/env.sh
[ -f weights/abacus.h5 ] || moempi convert weights/abacus weights/abacus.h5

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python - "$folder/sort.jsonl" <<'PYTHON'
import json, random, sys

digits = random.Random(7)
with open(sys.argv[1], "w", encoding="utf-8") as file:
    for number in range(384):
        word = "".join(digits.choices("0123456789", k=digits.randint(3, 6)))
        line = {"id": f"sort-{number}", "prompt": f"sort {word}:", "reference": "".join(sorted(word))}
        file.write(json.dumps(line) + "\n")
PYTHON

for mode in off bias capacity; do
    echo "balance.mode = \"$mode\""
    mpirun -n "$ranks" moempi run jobs/abacus.toml --set "balance.mode=$mode" --set "input.prompts=$folder/sort.jsonl" \
        --set "output.results=$folder/$mode.h5" 2>"$folder/$mode.log" >"$folder/$mode.txt" || {
        cat "$folder/$mode.log" >&2
        exit 1
    }
    grep -E "imbalance|balancing|moved|quality|exact" "$folder/$mode.txt"
done
