"""The command of lm-evaluation-harness with the model `moempi`: `mpirun -n 4 python -m moempi.api.evaluate run ...`."""

import os
import sys
from importlib.util import find_spec

from moempi.errors import UsageError
from moempi.printing import print_error
from moempi.runtime.script_world import script_world


def main() -> int:
    """Run the harness's command on all ranks alike; rank 0 alone prints and writes results. Returns the exit status."""
    rank = script_world().rank
    if find_spec("lm_eval") is None:
        if rank == 0:
            print_error("lm-evaluation-harness is not installed: bash jobs/setup.sh eval")
        return UsageError.exit_code
    os.environ["LOCAL_RANK"] = str(rank)  # by which the harness tells apart ranks that compute the same
    if rank:
        os.environ |= {"LMEVAL_LOG_LEVEL": "ERROR", "TQDM_DISABLE": "1"}
    from lm_eval.__main__ import cli_evaluate

    import moempi.api.lm_eval  # noqa: F401  # registers the model

    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
