"""What `moempi convert` says of a checkpoint's tokenizer."""

from moempi.cli import main
from storage.checkpoints import write_checkpoint


def test_a_checkpoint_without_a_tokenizer_is_converted_and_says_so(tmp_path, capsys):
    hub, weights = tmp_path / "hub", tmp_path / "model.h5"
    write_checkpoint(hub)
    assert main(["convert", str(hub), str(weights)]) == 0
    assert "tokenizer" not in "".join(capsys.readouterr())
    (hub / "tokenizer.json").unlink()
    assert main(["convert", str(hub), str(weights), "--force"]) == 0
    assert f"{hub}: holds no tokenizer: prompts for {weights} are lists of tokens" in capsys.readouterr().out


def test_a_tokenizer_that_is_not_read_is_a_data_error(tmp_path, capsys):
    hub = tmp_path / "hub"
    write_checkpoint(hub)
    (hub / "tokenizer.json").rename(hub / "vocab.json")
    assert main(["convert", str(hub), str(tmp_path / "model.h5")]) == 65
    assert (
        "vocab.json: only tokenizer.json, tokenizer.model and tiktoken.model are read; let transformers"
        in capsys.readouterr().err
    )
