"""Rules that no linter has: `python tests/house_rules.py` prints each breach and exits with 1 if there is any.

One word has one meaning. WORDS lists words that used to name something for which the field has a term, with that term;
none may be part of the name of a module, class, function, parameter or attribute. NAMES lists whole names of the same
kind whose words are otherwise in use. KEPT lists names that are keys of files, which never change.

Text of a file reaches a terminal or a log escaped. SINKS lists calls that would pass it on raw, with the modules of the
package that may call them because they escape it, or print only the program's own words.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "app/moempi"
MAX_LINES = 60

WORDS = {
    "answer": "output, sampled token or reply",
    "answers": "outputs or sampled tokens",
    "arrives": "receives",
    "asked": "requested, preferred or logit_requests",
    "board": "shared flags",
    "departing": "immediate_stages",
    "departs": "sends_immediate",
    "departure": "immediate combine",
    "evenness": "imbalance_price",
    "farewell": "abort channel",
    "foretell": "predict",
    "foretold": "predicted",
    "gates": "forwarders",
    "gating": "routing policy",
    "hear": "on_signal",
    "hearers": "receivers",
    "landing": "receipt",
    "landings": "receipts",
    "ledger": "recorder",
    "leg": "phase",
    "legs": "phases",
    "lesson": "calibration run",
    "lessons": "calibration runs",
    "mourn": "on_peer_exit",
    "neighbours": "node_ranks",
    "notice": "header",
    "onward": "immediate or stage link",
    "picked": "sampled",
    "refusing": "raising_data_errors",
    "room": "slot, buffer or remaining positions",
    "rooms": "slots or buffers",
    "scene": "deployment",
    "seat": "rank layout",
    "settle": "flush",
    "shifts": "expert bias",
    "stall": "hang",
    "stalled": "on_hang",
    "stands": "rank position",
    "strike": "inject",
    "struck": "inject_fault",
    "survey": "journal index",
    "tally": "move counter",
    "tell": "announce, send or write",
    "told": "announced or received",
    "traffic": "transfers",
    "turn": "parity, replica period or round",
    "turns": "rounds",
    "ways": "exchange factory",
    "wish": "placement request",
    "wished": "requested",
    "witness": "monitor",
}
NAMES = {
    "Choice": "SamplingRequest",
    "Deferred": "StartAfter",
    "InBuffer": "BufferReceipt",
    "ManyOf": "Sequence",
    "Mark": "Event",
    "Messages": "RequestGroup",
    "Network": "LaneComm",
    "Part": "JournalReader",
    "PartWriter": "JournalWriter",
    "Parts": "Journals",
    "Text": "TextTokenizer",
    "Uses": "ExpertUsage",
    "Crossings": "NodeTransfers",
    "agree": "raise_together or iallreduce_sum",
    "between": "progress",
    "collect": "exchange_logits",
    "cross": "node_transfers",
    "even_out": "rebalance",
    "gather": "all_gather or co_locate",
    "hand_over": "send_rows",
    "keeps_records": "writes_records",
    "keys_of": "physical_ids",
    "leave": "send_residual",
    "listen": "on_route",
    "look": "poll",
    "mark": "record_event",
    "network": "comm",
    "pick": "sample",
    "places": "output_rows, local_ranks or entries",
    "reach": "register_host_memory",
    "remove_names": "unlink_segments",
    "report_of": "run_report",
    "scatter": "reduce_scatter",
    "spread": "plan_from_counts",
    "take_turns": "pick_replicas",
    "then": "StartAfter",
    "together": "collectively",
    "wanted": "logit_rows",
    "wire": "comm_buffer",
}
KEPT = {
    "island": "a key of topology.json and a column of the results",
    "turn_us": "a key of machine.toml",
    "asked_load": "a column of the results and of journals",
    "shifts": "a column of journals",
}
SINKS: dict[str, tuple[str, ...]] = {
    "print": ("printing.py", "commands/completion.py"),
    "traceback.print_exc": (),
    "traceback.print_exception": (),
    "sys.stdout.write": (),
    "sys.stderr.write": (),
    "os.write": ("printing.py", "storage/journal.py"),
    "Console": (),
    "Text": (),
    "Text.from_markup": (),
    "logging.basicConfig": (),
    "logging.Formatter": (),
    "logging.FileHandler": ("observe/logs.py",),
    "logging.StreamHandler": ("observe/logs.py",),
}


def names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of every class, function, parameter and attribute that the module defines."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) if name.startswith("test_"):
                pass  # a sentence
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                yield node.lineno, node.name
            case ast.arg():
                yield node.lineno, node.arg
            case ast.Attribute(ctx=ast.Store()):
                yield node.lineno, node.attr
    for owner in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for node in owner.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                yield node.lineno, node.target.id


def words(name: str) -> list[str]:
    """The words of a snake_case or CamelCase name, in lower case."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)]


def standard_term(name: str) -> str | None:
    """What to say instead of a name; None if nothing is wrong with it."""
    if name in KEPT:
        return None
    if name in NAMES:
        return NAMES[name]
    return next((WORDS[word] for word in words(name) if word in WORDS), None)


def breaches(path: Path) -> Iterator[str]:
    """Every breach of a rule in one file."""
    where, tree = path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))
    if term := standard_term(path.stem):
        yield f"{where}: the module's name is a private word; the field says: {term}"
    for line, name in names(tree):
        if term := standard_term(name):
            yield f"{where}:{line}: {name} is a private word; the field says: {term}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= MAX_LINES:
            yield f"{where}:{node.lineno}: {node.name} has more than {MAX_LINES} lines"
        if isinstance(node, ast.Call) and path.is_relative_to(PACKAGE):
            call = ast.unparse(node.func)
            if call in SINKS and path.relative_to(PACKAGE).as_posix() not in SINKS[call]:
                yield f"{where}:{node.lineno}: {call} does not escape: use moempi.printing or moempi.observe"


def main() -> int:
    """Check the package and the tests."""
    paths = [path for folder in ("app", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
    found = [breach for path in paths for breach in breaches(path)]
    print("\n".join(found) if found else f"house rules: {len(paths)} files, nothing found")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
