"""Prints times and bytes of jobs on four virtual hosts of two ranks, whose links have a given speed.

A time is that of all steps on the slowest rank, without loading. A row of the table is one way to run the same prompts.
"""

import sys

import h5py

from cluster import hosts
from cluster.jobs import Job, write_prompts

RATES = ("1gbit", "100mbit")
WAYS = {
    "one hop, blocking": {"run__overlap": "false"},
    "one hop, overlap": {},
    "two hops, blocking": {"exchange__hops": 2, "run__overlap": "false"},
    "two hops, overlap": {"exchange__hops": 2},
    "placed by topology, blocking": {"placement__file": "placement.json", "run__overlap": "false"},
    "placed by topology, overlap": {"placement__file": "placement.json"},
    "two stages": {"parallel__stages": 2},
    "two stages, immediate": {"parallel__stages": 2, "exchange__immediate": "true"},
}


def seconds(job: Job) -> float:
    with h5py.File(job.results) as file:
        phases = [file[f"timing/{name}"][...] for name in ("compute", "exchange", "pipeline", "idle", "disk")]
        return float(sum(phases).max())


def main() -> int:
    folder = hosts.SHARED / "figures"
    folder.mkdir()
    hosts.run("moempi", "init", hosts.HERE / "arch.toml", folder / "net.h5", "--seed", "1")
    write_prompts(folder / "net.jsonl", num=24, tokens=120, vocabulary=512)
    net = {
        "model__weights": folder / "net.h5",
        "input__prompts": folder / "net.jsonl",
        "run__precision": "float32",
        "run__max_sequences": 8,
        "sampling__max_tokens": 2,
        "sampling__ignore_eos": "true",
        "exchange__transport": "pairwise",
    }
    recorded = Job(folder / "recorded", **net, trace__routing="true")
    recorded.run()
    hosts.run("moempi", "place", recorded.results, "--replicas", "0.25", "-o", folder / "placement.json")
    print(f"{'links':<8} {'way':<30} {'seconds':>8} {'MB on the links':>16}  answers")
    for rate in sys.argv[1:] or RATES:
        for number, (name, own) in enumerate(WAYS.items()):
            placed = {key: folder / value if key == "placement__file" else value for key, value in own.items()}
            job = Job(folder / f"{rate}-{number}", **net, **placed)
            with hosts.shaped(rate, *hosts.HOSTS):
                before = hosts.sent_bytes()
                job.run()
                sent = hosts.sent_bytes() - before
            same = job.compare(recorded, within=1e-4).partition(";")[0]
            print(f"{rate:<8} {name:<30} {seconds(job):>8.2f} {sent / 1e6:>16.1f}  {same}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
