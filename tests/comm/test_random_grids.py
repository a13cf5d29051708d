"""Random small grids, lanes and workloads: each run ends, with the results of a run on one rank.

MOEMPI_RANDOM_GRIDS is the number of grids.
"""

import os
import random

import pytest

from moempi.config.architecture import Architecture, AttentionShape, Experts, Router
from moempi.config.job import Job
from moempi.config.reading import read_tree
from moempi.engine.run import run_job
from moempi.runtime.stop import Stop
from moempi.runtime.waiting import barrier
from moempi.runtime.world import World
from moempi.storage.compare import compare
from moempi.storage.initialize import initialize

NUM_GRIDS = int(os.environ.get("MOEMPI_RANDOM_GRIDS", "60"))
ARCHITECTURE = Architecture(
    family="random",
    vocab_size=40,
    width=16,
    num_layers=4,
    max_positions=160,
    attention=AttentionShape(num_heads=2, num_kv_heads=2, head_dim=8),
    experts=Experts(num=5, width=8, router=Router(top_k=2)),
    dense_layers=(1,),
    dense_width=12,
)


def random_job(dice, folder):
    """A job and its number of ranks: uneven stages, more lanes than work, skewed prompts."""
    stages, tensor = dice.randrange(1, 5), dice.choice([1, 1, 2])
    ranks = [tensor * dice.randrange(1, 4) for _ in range(stages)]
    prompts = folder / "prompts.jsonl"
    lengths = [dice.choice([1, 2, 9, 70]) for _ in range(dice.choice([1, 1, 2, 7, 12]))]
    prompts.write_text("".join(f'{{"tokens": {[dice.randrange(40)] * length}}}\n' for length in lengths))
    tree = {
        "task": dice.choice(["generate", "score"]),
        "model": {"weights": str(folder / "weights.h5")},
        "input": {"prompts": str(prompts)},
        "output": {"results": str(folder / "out.h5")},
        "run": {
            "precision": "float32",
            "overlap": dice.random() < 0.8,
            "micro_batches": dice.choice([1, 2, 3, 5, 8, "auto"]),
            "lanes": dice.choice(["auto", "auto", 1, 2, 3]),
            "max_sequences": dice.choice([1, 2, 8]),
            "batch_tokens": dice.choice([1, 7, 64]) if sum(lengths) < 60 else 64,
            "timeout_s": 60.0,
        },
        "sampling": {"max_tokens": dice.choice([1, 3])},
        "exchange": dice.choice([{}, {"hops": 1}, {"immediate": True}, {"immediate": True}, {"hops": 2}, {"hops": 2}]),
        "topology": {"ranks_per_node": tensor * dice.choice([1, 2, 3])},
        "parallel": {"stages": stages, "tensor": tensor, "stage_ranks": ranks},
    }
    return tree, sum(ranks)


def run(tree, comm, num_ranks):
    """Run the job on the first `num_ranks` ranks of comm."""
    own = comm.Split(int(comm.rank >= num_ranks), comm.rank)
    if comm.rank < num_ranks:
        run_job(read_tree(tree, Job, origin="random"), job_text="", world=World(own), stop=Stop(), strict=True)
    own.Free()
    barrier(comm)


@pytest.mark.ranks(12)
def test_random_grids_give_the_results_of_one_rank(comm, tmp_path):
    folder = comm.bcast(tmp_path)
    if comm.rank == 0:
        initialize(ARCHITECTURE, folder / "weights.h5", seed=1)
    dice = random.Random(61)
    done = 0
    while done < NUM_GRIDS:
        tree, num_ranks = random_job(dice, folder)
        if num_ranks > comm.size:
            continue
        barrier(comm)
        run(tree, comm, num_ranks)
        alone = {"output": {"results": str(folder / "single.h5")}, "parallel": {}, "exchange": {}, "topology": {}}
        single = tree | alone
        run(single, comm, 1)
        found = compare(folder / "out.h5", folder / "single.h5") if comm.rank == 0 else None
        barrier(comm)
        found = comm.bcast(found)
        assert found.different == 0, tree
        exact = tree["parallel"]["tensor"] == tree["exchange"].get("hops", 1) == 1
        assert found.largest <= (0.0 if exact else 1e-4), tree
        done += 1
