"""Configs as they were published, and what is asked for that is not there."""

import json

from etils import epath
import pytest

from rlhf_jax.models.attention import RopeScaling
from rlhf_jax.models.families import hf_config, huggingface

PUBLISHED = {
    # The fields of config.json as they were published, shapes made small.
    "gpt2": {
        "model_type": "gpt2", "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "n_ctx": 1024,
        "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 1024,
        "resid_pdrop": 0.1, "summary_activation": None,
        "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
        "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"max_length": 50}},
        "vocab_size": 50257, "_num_labels": 1,
    },
    "opt": {
        "model_type": "opt", "activation_dropout": 0.0,
        "activation_function": "relu", "attention_dropout": 0.0,
        "bos_token_id": 2, "do_layer_norm_before": True, "dropout": 0.1,
        "eos_token_id": 2, "ffn_dim": 64, "hidden_size": 16, "init_std": 0.02,
        "layerdrop": 0.0, "max_position_embeddings": 2048,
        "num_attention_heads": 2, "num_hidden_layers": 2, "pad_token_id": 1,
        "prefix": "</s>", "torch_dtype": "float16", "use_cache": True,
        "vocab_size": 50272, "word_embed_proj_dim": 16,
    },
    "pythia": {
        "model_type": "gpt_neox", "bos_token_id": 0, "eos_token_id": 0,
        "hidden_act": "gelu", "hidden_size": 16, "initializer_range": 0.02,
        "intermediate_size": 64, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048, "num_attention_heads": 2,
        "num_hidden_layers": 2, "rotary_emb_base": 10000, "rotary_pct": 0.25,
        "tie_word_embeddings": False, "torch_dtype": "float16",
        "use_cache": True, "use_parallel_residual": True, "vocab_size": 50304,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "qwen2.5": {
        "model_type": "qwen2", "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 1, "hidden_act": "silu", "hidden_size": 16,
        "initializer_range": 0.02, "intermediate_size": 32,
        "max_position_embeddings": 32768, "max_window_layers": 24,
        "num_attention_heads": 2, "num_hidden_layers": 2,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "use_cache": True, "use_mrope": False, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "llama3.2": {
        "model_type": "llama", "attention_bias": False,
        "attention_dropout": 0.0, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "head_dim": 8,
        "hidden_act": "silu", "hidden_size": 16, "initializer_range": 0.02,
        "intermediate_size": 32, "max_position_embeddings": 131072,
        "mlp_bias": False, "num_attention_heads": 2, "num_hidden_layers": 2,
        "num_key_value_heads": 1, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0",
        "use_cache": True, "vocab_size": 128256,
    },
    "qwen2.5_window": {
        "model_type": "qwen2", "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 1, "hidden_act": "silu", "hidden_size": 16,
        "initializer_range": 0.02, "intermediate_size": 32,
        "max_position_embeddings": 131072, "max_window_layers": 1,
        "num_attention_heads": 2, "num_hidden_layers": 2,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 131072,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "use_cache": True, "use_sliding_window": True, "vocab_size": 152064,
    },
    "gemma-2": {
        "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0, "bos_token_id": 2,
        "cache_implementation": "hybrid", "eos_token_id": 1,
        "final_logit_softcapping": 30.0, "head_dim": 8,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 16,
        "initializer_range": 0.02, "intermediate_size": 32,
        "max_position_embeddings": 8192, "num_attention_heads": 2,
        "num_hidden_layers": 2, "num_key_value_heads": 1, "pad_token_id": 0,
        "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0, "sliding_window": 4096,
        "sliding_window_size": 4096, "torch_dtype": "float32",
        "transformers_version": "4.42.0.dev0", "use_cache": True,
        "vocab_size": 256000,
    },
    "gemma-3": {
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": None, "bos_token_id": 2,
        "cache_implementation": "hybrid", "eos_token_id": [1, 106],
        "final_logit_softcapping": None, "head_dim": 8,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 16,
        "initializer_range": 0.02, "intermediate_size": 32,
        "max_position_embeddings": 131072, "num_attention_heads": 2,
        "num_hidden_layers": 2, "num_key_value_heads": 1, "pad_token_id": 0,
        "query_pre_attn_scalar": 168, "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "rope_theta": 1000000, "sliding_window": 512,
        "sliding_window_pattern": 2, "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0", "use_cache": True,
        "vocab_size": 262144,
    },
    "phi-3": {
        "model_type": "phi3", "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000,
        "hidden_act": "silu", "hidden_size": 16, "initializer_range": 0.02,
        "intermediate_size": 32, "max_position_embeddings": 4096,
        "num_attention_heads": 2, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "original_max_position_embeddings": 4096,
        "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "use_cache": True, "vocab_size": 32064,
    },
    "olmo-2": {
        "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": False, "attention_dropout": 0.0,
        "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 16,
        "initializer_range": 0.02, "intermediate_size": 32,
        "max_position_embeddings": 4096, "num_attention_heads": 2,
        "num_hidden_layers": 2, "num_key_value_heads": 2,
        "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 500000, "tie_word_embeddings": False,
        "torch_dtype": "float32", "use_cache": True, "vocab_size": 100352,
    },
    "mixtral": {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 16, "initializer_range": 0.02,
        "intermediate_size": 32, "max_position_embeddings": 32768,
        "num_attention_heads": 2, "num_experts_per_tok": 2,
        "num_hidden_layers": 2, "num_key_value_heads": 1,
        "num_local_experts": 8, "output_router_logits": False,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "use_cache": True, "vocab_size": 32000,
    },
}
# What each of these must have come to, beside width and number of layers.
WANTED = {
    "gpt2": dict(position="learned", activation="gelu", ff_dim=64),
    "opt": dict(activation="relu", norm_epsilon=1e-5),
    "pythia": dict(
        rotary_fraction=0.25,
        rope_scaling=RopeScaling(kind="linear", factor=4.0),
    ),
    "qwen2.5": dict(attention_bias="qkv", sliding_window=0),
    "llama3.2": dict(
        rope_theta=500000.0,
        tie_head=True,
        rope_scaling=RopeScaling(
            kind="llama3", factor=32.0, original_length=8192
        ),
    ),
    "qwen2.5_window": dict(
        sliding_window=131072, full_attention_layers=(0,)
    ),
    "gemma-2": dict(
        activation="geglu",
        attention_softcap=50.0,
        logit_softcap=30.0,
        query_scale_dim=144,
        sliding_window=4096,
        full_attention_layers=(1,),
        local_rope_theta=0.0,
        norm_placement="pre_and_post",
        tie_head=True,
    ),
    "gemma-3": dict(
        attention_softcap=0.0,
        logit_softcap=0.0,
        qk_norm="head",
        sliding_window=512,
        full_attention_layers=(1,),
        rope_theta=1e6,
        local_rope_theta=1e4,
        rope_scaling=RopeScaling(kind="linear", factor=8.0),
        tie_head=True,
    ),
    "phi-3": dict(sliding_window=2047, rotary_fraction=1.0, tie_head=False),
    "olmo-2": dict(norm_placement="post", qk_norm="whole", rope_theta=5e5),
    "mixtral": dict(num_experts=8, experts_per_token=2, sliding_window=0),
}


def read(folder, config):
  (folder / "config.json").write_text(json.dumps(config))
  model_type, fields = hf_config.read_fields(epath.Path(folder))
  family = huggingface.find_family(model_type, "config.json")
  return huggingface.make_config(family, fields)


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_are_read_as_they_were_published(name, tmp_path):
  config = read(tmp_path, PUBLISHED[name])
  assert (config.width, config.num_layers) == (16, 2)
  found = {field: getattr(config, field) for field in WANTED[name]}
  assert found == WANTED[name]


SHORT, LONG = [1.0] * 4, [2.0] * 4


@pytest.mark.parametrize(
    "name, changes, message",
    [
        (
            "phi-3",
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": SHORT,
                    "long_factor": LONG,
                },
            },
            "rope_type='longrope' is not implemented",
        ),
        (
            "gemma-3",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention=True is not implemented",
        ),
        (
            "gemma-2",
            {"hidden_activation": "gelu"},
            "hidden_activation='gelu' is not implemented",
        ),
        (
            "mixtral",
            {"router_jitter_noise": 0.1},
            "router_jitter_noise=0.1 is not implemented",
        ),
        (
            "gemma-2",
            {"layer_types": ["chunked_attention", "full_attention"]},
            "'chunked_attention' is not implemented",
        ),
        (
            "gemma-2",
            {"sliding_window": None},
            "'sliding_attention', and sliding_window=None",
        ),
        (
            "mixtral",
            {"num_experts_per_tok": 9},
            "experts_per_token=9 must be in 1..num_experts=8",
        ),
        ("olmo-2", {"clip_qkv": 8.0}, "not implemented: clip_qkv=8.0"),
        ("phi-3", {"lm_head_bias": True}, "not implemented: lm_head_bias"),
    ],
)
def test_what_a_family_does_not_have_is_named(name, changes, message, tmp_path):
  with pytest.raises(huggingface.FamilyError, match=message):
    read(tmp_path, PUBLISHED[name] | changes)
