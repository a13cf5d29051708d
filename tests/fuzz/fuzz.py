"""Fuzzing of every file that the program reads: python tests/fuzz/fuzz.py [CLASS...] [--inputs N] [--seed S] [--only I]

Prints a table with a row a class: inputs, the share that was accepted, findings (see campaign.py), seconds of the
slowest input, the largest growth of memory, refusals by exit code. Inputs with findings are kept below --save;
`--only I` runs one input again. With --commands the program itself runs on each input. Exits with 1 after a finding.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fuzz.campaign import HEAD, fuzz, fuzz_commands
from fuzz.seeds import seeded_folder
from fuzz.subjects import SUBJECTS

MAX_SHOWN = 20
"""Findings of a class that are printed."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classes", nargs="*", metavar="CLASS", help=f"some of {', '.join(SUBJECTS)}; default: all")
    parser.add_argument("--inputs", type=int, default=2000, help="inputs of each class (2000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, metavar="I", help="the input with this index alone")
    parser.add_argument("--save", type=Path, default=Path("fuzz-findings"), help="(fuzz-findings)")
    parser.add_argument("--commands", action="store_true", help="run the program itself, with the class's commands")
    chosen = parser.parse_args()
    indices: Sequence[int] = range(chosen.inputs) if chosen.only is None else [chosen.only]
    print(HEAD)
    num_findings = 0
    with seeded_folder() as folder:
        for name in chosen.classes or list(SUBJECTS):
            subject = SUBJECTS[name](folder / "seeds")
            if chosen.commands:
                score = fuzz_commands(subject, indices, seed=chosen.seed, folder=folder)
            else:
                score = fuzz(subject, indices, seed=chosen.seed, folder=folder, save=chosen.save.resolve())
            print(score.row(), flush=True)
            for ending in score.findings[:MAX_SHOWN]:
                print(f"    {name} --seed {chosen.seed} --only {ending.index}: {ending.finding!r}", flush=True)
            num_findings += len(score.findings)
    return bool(num_findings)


if __name__ == "__main__":
    sys.exit(main())
