"""How the figures of a forecast come about: `moempi plan --explain`."""

from collections.abc import Iterator

from moempi.config.machine_file import MachineFile
from moempi.layout.schedule import HEAD_POINTS, LOGITS
from moempi.planning.forecast import Forecast


def formulas(found: Forecast, machine: MachineFile) -> Iterator[str]:
    """A line for each figure of the forecast's tables, with the numbers that it is computed from."""
    step_ms, waiting_ms, ideal_ms = (
        seconds * 1e3
        for seconds in (found.micro_batch_s(overlap=True), found.micro_batch_s(overlap=False), found.ideal_s)
    )
    rate = found.tokens_per_s(overlap=True)
    yield f"{found.workload.name}:"
    yield f"  token/s {rate:,.0f} = {found.tokens:,.1f} tokens of a micro-batch / {step_ms:.3f} ms"
    if not found.workload.prompt:
        yield f"  {found.tokens:,.1f} tokens = {found.sequences:,.0f} sequences / {found.in_flight} micro-batches"
    if not found.is_full:
        yield f"  {found.in_flight} micro-batches do not fill {len(found.stages)} x {found.lanes} lanes: simulated"
    yield f"  a rank {rate / found.num_ranks:,.1f} = {rate:,.0f} token/s / {found.num_ranks:,} ranks"
    yield f"  of ideal {ideal_ms / step_ms:.1%} = {ideal_ms:.3f} ms, mean compute of all ranks / {step_ms:.3f} ms"
    yield f"  gain {waiting_ms / step_ms:.2f} = {waiting_ms:.3f} ms if ranks wait for rows / {step_ms:.3f} ms"
    turn_ms = found.seconds(overlap=True) * 1e3
    if found.workload.output:
        yield f"  ms a token {turn_ms:.1f} = {found.in_flight} micro-batches in flight x {step_ms:.3f} ms"
    if found.workload.prompt:
        steps = found.first_token_steps
        yield f"  first s {found.first_token_s:.2f} = {steps:,.0f} steps of a prompt x {turn_ms / 1e3:.4f} s"
    yield from _slowest_stage(found, machine)


def _slowest_stage(found: Forecast, machine: MachineFile) -> Iterator[str]:
    number, slowest = max(enumerate(found.stages), key=lambda numbered: numbered[1].overlapped_s)
    gflop, megabytes = slowest.arithmetic_s * machine.tflops * 1e3, slowest.memory_s * machine.memory_gb_s * 1e3
    step_ms = slowest.overlapped_s * 1e3
    yield f"  stage {number}, the slowest: {step_ms:.3f} ms a step with {slowest.lanes} lanes; its parts alone:"
    yield f"    arithmetic {slowest.arithmetic_s * 1e3:.3f} ms = {gflop:,.1f} GFLOP / {machine.tflops:,g} TFLOP/s"
    yield f"    memory {slowest.memory_s * 1e3:.3f} ms = {megabytes:,.0f} MB / {machine.memory_gb_s:,g} GB/s"
    host_ms, link_ms, travel_ms = (part * 1e3 for part in (slowest.host_s, slowest.link_s, slowest.travel_s))
    yield f"    host {host_ms:.3f} ms, link {link_ms:.3f} ms, travel {travel_ms:.3f} ms"
    head = [phase for phase in found.stages[-1].phases if phase.point in HEAD_POINTS]
    if head:
        travel = ", ".join(f"{phase.point.phase.removeprefix('head ')} {phase.travel_s * 1e3:.3f} ms" for phase in head)
        computing_ms = sum(phase.compute_s for phase in head if phase.point == LOGITS) * 1e3
        num_ranks = found.stages[-1].step.costs.head_ranks
        yield f"  head, divided among {num_ranks} ranks: logits {computing_ms:.3f} ms; travel: {travel}"
