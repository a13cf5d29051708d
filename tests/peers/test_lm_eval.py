"""The model `moempi` of lm-evaluation-harness, on 4 ranks in float32, beside the harness's own Hugging Face model."""

import json
from importlib import import_module
from pathlib import Path

import pytest

import mpirun as launching
from engine import chats
from moempi.errors import UsageError
from moempi.storage.convert import convert

pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")
families = pytest.importorskip("peers.families")

HARNESS = Path(__file__).with_name("harness.py")
WITHIN = 1e-4
TOKENS = {"vocab_size": 272, "bos_token_id": 256, "eos_token_id": 257}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

LONG = "the quick brown fox jumps over a lazy dog while nobody at all was watching it run through the old town " * 8
DOCUMENTS = {
    "choices": [
        {"text": "Is water wet", "choices": ["yes", "no", "perhaps not"], "answer": 0},
        {"text": "The fox is", "choices": ["brown", "blue"], "answer": 0},
        {"text": f"{LONG} Who ran?", "choices": ["the fox", "the town"], "answer": 0},
        {"text": "", "choices": ["a", "bc"], "answer": 1},
    ],
    "perplexity": [{"text": "Short."}, {"text": LONG[:230]}, {"text": LONG}, {"text": "日本 é"}],
    "continuation": [
        {"text": "One, two,", "answer": "three"},
        {"text": f"{LONG} Who ran?", "answer": "the fox"},
        {"text": "An end.", "answer": ""},
    ],
}
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {documents}
test_split: test
fewshot_split: test
"""
KINDS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "perplexity": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
num_fewshot: 0
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "continuation": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n", "e"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random checkpoint with a tokenizer and a chat template, its weight file, and the tasks."""
    folder = tmp_path_factory.mktemp("harness")
    families.CASES["harness"] = ("mixtral", families.MIXTRAL | TOKENS)
    families.write_checkpoint(folder / "hub", "harness")
    chats.write_tokenizer(folder / "hub", "mixtral")
    convert(folder / "hub", folder / "model.h5")
    (folder / "tasks").mkdir()
    for name, documents in DOCUMENTS.items():
        lines = folder / f"{name}.jsonl"
        lines.write_text("".join(json.dumps(document) + "\n" for document in documents))
        (folder / f"tasks/{name}.yaml").write_text(TASK.format(name=name, documents=lines) + KINDS[name])
    return folder


@pytest.fixture(scope="module")
def model(folder):
    """The model of the harness in this process."""
    return import_module("moempi.api.lm_eval").MoempiLM(str(folder / "model.h5"), precision="float32")


def evaluate(folder, ranks, model, **arguments):
    """What a model answers to all tasks, on so many ranks."""
    out = folder / f"{model}.json"
    words = (HARNESS, model, json.dumps(arguments), folder / "tasks", out)
    outcome = launching.mpirun(ranks, *launching.python(*words), HF_HOME=str(folder / "home"), **OFFLINE)
    assert outcome.code == 0, outcome.err
    return json.loads(out.read_text())


@pytest.mark.mpi
def test_every_task_is_answered_as_by_the_hugging_face_model_with_and_without_chat_template(folder):
    theirs = evaluate(folder, 1, "hf", pretrained=str(folder / "hub"), dtype="float32", device="cpu")
    ours = evaluate(folder, 4, "moempi", weights=str(folder / "model.h5"), precision="float32", stages=2)
    for way, tasks in theirs.items():
        for task, expected in tasks.items():
            found = ours[way][task]
            assert found["contexts"] == expected["contexts"], (way, task)
            assert_equal(found["answers"], expected["answers"])
            assert found["metrics"].keys() == expected["metrics"].keys()
            for metric, value in expected["metrics"].items():
                assert found["metrics"][metric] == pytest.approx(value, rel=WITHIN), (way, task, metric)


def assert_equal(found, expected):
    """Texts and flags are equal; numbers within WITHIN, and what a float32 sum of hundreds of tokens loses."""
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-7, abs=WITHIN)
    else:
        assert found == expected


def test_generation_arguments_become_sampling_and_others_are_refused(model):
    until = {"until": "x", "max_gen_toks": 4}
    sampled = {"do_sample": True, "temperature": 0.5, "top_p": 0.9}
    assert model._prompt("ab", until) == {"tokens": model.tok_encode("ab"), "max_tokens": 4, "stop": ["x"]}
    drawn = model._prompt("ab", until | sampled)
    assert (drawn["temperature"], drawn["top_p"], drawn["max_tokens"], drawn["stop"]) == (0.5, 0.9, 4, ["x"])
    assert len(model._prompt("a" * 300, until)["tokens"]) == 252
    with pytest.raises(UsageError, match="gen_kwargs: num_beams: not supported"):
        model._prompt("ab", until | {"num_beams": 3})
    with pytest.raises(UsageError, match="256 tokens to generate leave none of 256"):
        model._prompt("ab", {})


def test_texts_and_chats_are_encoded_as_by_the_hugging_face_tokenizer(model, folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hub")
    assert (model.prefix_token_id, model.eot_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    for text in ("", "one", "<s> one", "日本</s>"):
        assert model.tok_encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)
        assert model.tok_encode(text) == tokenizer.encode(text, add_special_tokens=not text.startswith("<s>"))
    chat = [{"role": "user", "content": " one </s> "}, {"role": "assistant", "content": " two, "}]
    assert model.apply_chat_template(chat[:1]) == tokenizer.apply_chat_template(chat[:1], tokenize=False)
    assert model.apply_chat_template(chat, add_generation_prompt=False) == tokenizer.apply_chat_template(
        chat, tokenize=False, continue_final_message=True
    )
    assert model.chat_template(True) == tokenizer.chat_template


@pytest.mark.mpi
def test_the_command_prints_and_writes_the_results_once(folder, tmp_path):
    arguments = f"weights={folder / 'model.h5'},precision=float32,stages=2"
    words = ("run", "--model", "moempi", "--model_args", arguments, "--tasks", "choices", "--limit", "2")
    places = ("--include_path", folder / "tasks", "--output_path", tmp_path)
    outcome = launching.mpirun(
        2,
        *launching.python("-m", "moempi.api.evaluate", *words, *places),
        limit_s=300,
        HF_HOME=str(folder / "home"),
        **OFFLINE,
    )
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("|choices|") == 1
    assert len(list(tmp_path.rglob("results*.json"))) == 1
