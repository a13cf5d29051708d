"""Runs tasks with a model of lm-evaluation-harness, with and without its chat template, and writes what it answered:
harness.py MODEL ARGUMENTS FOLDER OUT, where ARGUMENTS is JSON and FOLDER holds the tasks. Rank 0 writes OUT.
"""

import json
import os
import sys
from pathlib import Path

import lm_eval.models  # noqa: F401  # registers the harness's own models
from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

import moempi.api.lm_eval  # noqa: F401  # registers moempi

name, arguments, folder, out = sys.argv[1:]
model = get_model(name).create_from_arg_obj(json.loads(arguments))
manager = TaskManager(include_path=folder, include_defaults=False)
tasks = sorted(path.stem for path in Path(folder).glob("*.yaml"))
found = {}
for chat in (False, True):
    results = simple_evaluate(
        model, tasks=tasks, task_manager=manager, apply_chat_template=chat, bootstrap_iters=0, num_fewshot=1
    )
    found[f"chat {chat}"] = {
        task: {
            "metrics": {key: value for key, value in results["results"][task].items() if isinstance(value, float)},
            "contexts": [sample["arguments"] for sample in results["samples"][task]],
            "answers": [sample["resps"] for sample in results["samples"][task]],
        }
        for task in tasks
    }
if int(os.environ.get("OMPI_COMM_WORLD_RANK", "0")) == 0:
    Path(out).write_text(json.dumps(found))
