"""Any text survives from the prompt file through records and results to the exports, in every place for texts."""

import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moempi.config.job import Sampling
from moempi.engine.request import Request
from moempi.storage.export import export
from moempi.storage.export_openai import openai_lines
from moempi.storage.prompt_file import read_prompts
from storage.test_results import merged

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT, lambda of: st.lists(of) | st.dictionaries(TEXT, of)
)


def records_of(path):
    """The records of a model that repeats each prompt."""
    for prompt in read_prompts(path, sampling=Sampling(), strict=True, folder=path.parent)[0]:
        request = Request(prompt, np.array([5], np.int32), limit=0)
        request.finish, request.text = "length", prompt.text
        yield request.to_record(task="generate")


def exported(path, folder, **options):
    results = merged(folder / "r.h5", list(records_of(path)), num_requests=2)
    export(results, folder / "out.jsonl", **options)
    return [json.loads(line) for line in (folder / "out.jsonl").open(encoding="utf-8", newline="\n")]


@settings(max_examples=50)
@given(text=TEXT, name=TEXT.filter(bool), metadata=st.dictionaries(TEXT, JSON, max_size=3), ascii_only=st.booleans())
def test_any_text_survives_from_prompt_to_export(tmp_path_factory, text, name, metadata, ascii_only):
    folder = tmp_path_factory.mktemp("any")
    line = {"id": f"1{name}", "prompt": text, "reference": name, "metadata": metadata}
    body = {"prompt": text, "metadata": metadata}
    batch = {"custom_id": f"1{name}", "method": "POST", "url": "/v1/completions", "body": body}
    for number, lines in enumerate(([line, {"prompt": name}], [batch, batch | {"custom_id": "2"}])):
        path = folder / f"{number}.jsonl"
        path.write_text("\n".join(json.dumps(one, ensure_ascii=ascii_only) for one in lines), "utf-8", newline="\n")
        first, _ = exported(path, folder)
        assert (first["id"], first["text"], first["metadata"]) == (f"1{name}", text, metadata)
        assert first.get("reference", name) == name
    first, _ = exported(path, folder, lines=openai_lines)
    (choice,) = first["response"]["body"]["choices"]
    assert (first["custom_id"], choice["text"], first["response"]["body"]["metadata"]) == (f"1{name}", text, metadata)
