import msgspec
import pytest

from moempi.config.families import FAMILIES, read_architecture
from moempi.config.families._family import Fused
from moempi.config.tensors import catalogue
from moempi.errors import DataError
from storage.checkpoints import QWEN3_MOE


def read(generation=None, without=(), **changes):
    values = {key: value for key, value in (QWEN3_MOE | changes).items() if key not in without}
    return read_architecture(values, generation or {}, origin="config.json")


@pytest.mark.parametrize(
    "other",
    [
        {"without": ("num_experts",), "num_local_experts": 5},
        {"num_local_experts": 5},
        {"without": ("rope_theta",), "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {"without": ("rope_theta",), "rope_scaling": {"rope_theta": 1000000, "type": "default"}},
        {"rope_parameters": {"rope_type": "default"}},
        {"without": ("rope_scaling", "sliding_window", "use_sliding_window", "attention_bias")},
        {"eos_token_id": [2]},
    ],
)
def test_all_spellings_give_the_same_architecture(other):
    assert read(**other) == read()


@pytest.mark.parametrize(
    ("listed", "step", "dense"),
    [([], 1, ()), (None, 1, ()), ([2, 0], 1, (0, 2)), ([], 2, (0, 2)), ([1], 2, (0, 1, 2)), ([], 3, (0, 1))],
)
def test_dense_layers(listed, step, dense):
    assert read(mlp_only_layers=listed, decoder_sparse_step=step).dense_layers == dense


@pytest.mark.parametrize(
    ("own", "generation", "ends"),
    [(2, {}, (2,)), (2, {"eos_token_id": [3, 2]}, (3, 2)), (2, {"eos_token_id": 5}, (5,)), (None, {}, ()),
     ([4, 4, 3], {"eos_token_id": None}, (4, 3))],
)  # fmt: skip
def test_end_tokens(own, generation, ends):
    assert read(generation, eos_token_id=own).eos_tokens == ends


def test_head_dim_without_a_key_is_width_over_heads():
    assert read(without=("head_dim",)).attention.head_dim == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported, only"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, only 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling: "),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 4.0}}, "'proportional'"),
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, "rope_theta has several values"),
        ({"num_local_experts": 6}, "num_experts and num_local_experts differ"),
        ({"norm_topk_prob": None}, "norm_topk_prob is missing"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1, not true or false"),
        ({"hidden_size": "16"}, "hidden_size is '16', not an integer"),
        ({"hidden_size": True}, "hidden_size is True, not an integer"),
        ({"hidden_size": 0}, "Expected `int` >= 1"),
        ({"rms_norm_eps": -1.0}, "Expected `float` > 0"),
        ({"num_experts_per_tok": 6}, "top_k 6 exceeds"),
        ({"num_key_value_heads": 3}, "not a multiple of num_kv_heads 3"),
        ({"eos_token_id": 70}, "beyond vocab_size"),
        ({"eos_token_id": "2"}, "not integers"),
        ({"mlp_only_layers": [3]}, "names a layer that is not there"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
    ],
)
def test_refusals_name_the_key(changes, message):
    with pytest.raises(DataError) as error:
        read(**changes)
    assert str(error.value).startswith("config.json: ")
    assert message in str(error.value)


@pytest.mark.parametrize("key", ["vocab_size", "rope_theta", "num_experts", "tie_word_embeddings", "rms_norm_eps"])
def test_no_value_has_a_default(key):
    with pytest.raises(DataError, match=f"{key}.* is missing"):
        read(without=(key,))


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_sources_are_distinct_and_one_per_expert(model_type):
    ungated = {"activation": "relu2"} if model_type == "nemotron_h" else {}
    model = msgspec.structs.replace(read(), **ungated)
    latent = msgspec.structs.replace(model.experts, latent_width=8 if ungated else 0)
    tensors = catalogue(msgspec.structs.replace(model, experts=latent))
    named = {tensor.name: FAMILIES[model_type].sources(tensor) for tensor in tensors if "_norm" not in tensor.name}
    flat = [name for sources in named.values() for name in (sources if isinstance(sources, tuple) else [sources])]
    assert len(set(flat)) == len(flat)
    stacked = named["layers/002/experts/up"]
    if not isinstance(stacked, Fused):
        assert len(stacked) == 5
        assert all("layers.2." in name for name in stacked)
        assert [f".experts.{expert}." in name for expert, name in enumerate(stacked)] == [True] * 5
