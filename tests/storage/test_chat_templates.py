"""Where a checkpoint has its chat templates, and that the weight file keeps them."""

import json

import h5py
import numpy as np
import pytest

from moempi.errors import DataError
from moempi.storage.chat_templates import ChatTemplates
from moempi.storage.convert import convert
from moempi.storage.weights import WeightFile
from storage.checkpoints import write_checkpoint
from storage.models import write_model

TEMPLATES = ChatTemplates({"default": "é{{ bos_token }}", "tool_use": "t"}, {"bos_token": "<s>"})


def converted(folder, *, config=None, **files):
    """The chat templates of a converted checkpoint with these files, and the bytes of its weight file."""
    hub = folder / "hub"
    write_checkpoint(hub)
    if config is not None:
        (hub / "tokenizer_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for name, text in files.items():
        path = hub / name.replace("__", "/").replace("_jinja", ".jinja").replace("_json", ".json")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    convert(hub, folder / "model.h5")
    with WeightFile.open(folder / "model.h5") as weights:
        return weights.chat


def test_a_checkpoint_without_a_template_makes_the_file_that_it_made_before(tmp_path):
    assert converted(tmp_path) is None
    before = (tmp_path / "model.h5").read_bytes()
    assert converted(tmp_path, config={"bos_token": None, "chat_template": None}) is None
    assert (tmp_path / "model.h5").read_bytes() == before


def test_a_template_in_the_configuration_is_kept_with_the_special_tokens(tmp_path):
    added = {"__type": "AddedToken", "content": "</s>", "special": True}
    config = {"chat_template": "a\u00e9", "bos_token": "<s>", "eos_token": added, "pad_token": None, "unk_token": 3}
    found = converted(tmp_path, config=config, special_tokens_map_json='{"cls_token": "c", "bos_token": "old"}')
    assert found == ChatTemplates({"default": "aé"}, {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "c"})


def test_a_list_of_templates_has_their_names(tmp_path):
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    assert converted(tmp_path, config={"chat_template": named}).templates == {"default": "a", "tool_use": "b"}


def test_files_of_templates_replace_those_of_the_configuration(tmp_path):
    config = {"chat_template": [{"name": "rag", "template": "a"}], "eos_token": "</s>"}
    files = {"chat_template_jinja": "b\r\n", "additional_chat_templates__tool_use_jinja": "c"}
    expected = ChatTemplates({"default": "b\r\n", "tool_use": "c"}, {"eos_token": "</s>"})
    assert converted(tmp_path, config=config, **files) == expected


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        ("[", {}, r"tokenizer_config\.json: not a JSON object"),
        ({"chat_template": 5}, {}, r"tokenizer_config\.json: chat_template: Expected `array`, got `int`"),
        ({"chat_template": [{"name": "a"}]}, {}, "chat_template: Object missing required field `template`"),
        ({"chat_template": [{"name": "a", "template": {}}]}, {}, "chat_template: Expected `str`, got `object`"),
        (None, {"chat_template_jinja": b"\xff"}, r"chat_template\.jinja: not UTF-8 text"),
        (None, {"chat_template_jinja": "x" * ((1 << 22) + 1)}, r"chat_template\.jinja: is longer than"),
        (None, {f"additional_chat_templates__{n}_jinja": "" for n in range(101)}, "more than 100 chat templates"),
    ],
    ids=lambda given: str(given)[:40],
)
def test_templates_of_another_form_are_refused_by_name(tmp_path, config, files, message):
    with pytest.raises(DataError, match=message):
        converted(tmp_path, config=config, **files)


def test_a_weight_file_has_its_templates_and_another_fingerprint(tmp_path):
    without = write_model(tmp_path / "a.h5")
    assert write_model(tmp_path / "b.h5", chat=TEMPLATES) != without
    with WeightFile.open(tmp_path / "a.h5") as first, WeightFile.open(tmp_path / "b.h5") as second:
        assert (first.chat, second.chat) == (None, TEMPLATES)


def test_templates_that_are_changed_removed_or_no_templates_are_refused(tmp_path):
    for name, change in {
        "changed": lambda file: file["chat_templates"].__setitem__(5, 0),
        "removed": lambda file: file.__delitem__("chat_templates"),
        "linked": lambda file: (
            file.move("chat_templates", "x") or file.__setitem__("chat_templates", h5py.SoftLink("x"))
        ),
    }.items():
        write_model(tmp_path / f"{name}.h5", chat=TEMPLATES)
        with h5py.File(tmp_path / f"{name}.h5", "r+") as file:
            change(file)
        with pytest.raises(DataError, match=name), WeightFile.open(tmp_path / f"{name}.h5"):
            pass


def test_what_is_added_to_a_file_without_templates_is_refused(tmp_path):
    write_model(tmp_path / "added.h5")
    with h5py.File(tmp_path / "added.h5", "r+") as file:
        file["chat_templates"] = np.frombuffer(b"{}", np.uint8)
    with pytest.raises(DataError, match="fingerprint"), WeightFile.open(tmp_path / "added.h5"):
        pass
