"""A script with every ending, run by test_endings.py: python endings.py WEIGHTS ENDING."""

import os
import signal
import sys

from moempi import LLM


def fail(*_):
    raise ValueError("in the middle of a call")


weights, ending = sys.argv[1:]
llm = LLM(weights, precision="float32", timeout_s=300)
print(llm.rank, llm.generate(["72+71="])[0].text)
if ending == "closed":
    llm.close()
if ending == "all":
    raise ValueError("all ranks have it")
if ending == "different":
    llm.generate([f"{llm.rank}+1="])
if llm.rank == 1:
    match ending:
        case "exception":
            raise ValueError("a bad\nvalue")
        case "inside":
            llm._engine.scheduler.retire = fail
        case "exit":
            sys.exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
if ending not in ("good", "closed"):
    print(llm.generate(["1+1="] * 3)[0].text)
