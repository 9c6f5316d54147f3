"""Networks over text, from the `transformers` library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loadtests.zoo._host import BART, SMALL, Host, numbers, tokens, transformer

if TYPE_CHECKING:
    from loadtests.zoo._host import Batch

__all__ = ["HOSTS"]

_DECODER: dict[str, Any] = {
    **SMALL,
    "num_key_value_heads": 1,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_STATE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "use_cache": False,
    "pad_token_id": 0,
}
_T5: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "use_cache": False,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}

_text, _pair = tokens("input_ids"), tokens("input_ids", "decoder_input_ids")


def _encoder(name: str, model: str, draw: Batch = _text, **options: Any) -> Host:
    return transformer(name, "text encoder", model, draw, **{**SMALL, **options})


def _decoder(name: str, model: str, **options: Any) -> Host:
    return transformer(name, "text decoder", model, _text, **{**_DECODER, **options})


_ENCODERS = (
    _encoder("bert", "BertForSequenceClassification"),
    _encoder("roberta", "RobertaForMaskedLM"),
    _encoder("albert (one layer shared by all)", "AlbertModel", embedding_size=8),
    _encoder("electra", "ElectraForPreTraining", embedding_size=8),
    _encoder("deberta-v2", "DebertaV2Model", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    _encoder("mpnet", "MPNetModel"),
    _encoder("fnet (fourier mixing)", "FNetModel"),
    _encoder("modernbert", "ModernBertForMaskedLM", attn_implementation="sdpa", cls_token_id=1, sep_token_id=2),
    transformer(
        "distilbert",
        "text encoder",
        "DistilBertModel",
        _text,
        vocab_size=40,
        dim=16,
        n_layers=2,
        n_heads=2,
        hidden_dim=24,
        max_position_embeddings=32,
    ),
    transformer(
        "xlnet", "text encoder", "XLNetModel", _text, vocab_size=40, d_model=16, n_layer=2, n_head=2, d_inner=24
    ),
    transformer(
        "perceiver (latents)",
        "text encoder",
        "PerceiverModel",
        numbers("inputs", 2, 6, 16),
        num_latents=4,
        d_latents=16,
        d_model=16,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
    ),
)
_DECODERS = (
    transformer(
        "gpt2 (tied weights)",
        "text decoder",
        "GPT2LMHeadModel",
        _text,
        vocab_size=40,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    ),
    _decoder("gpt-neox", "GPTNeoXForCausalLM"),
    _decoder("llama", "LlamaForCausalLM"),
    _decoder("mistral", "MistralForCausalLM"),
    _decoder("qwen2", "Qwen2ForCausalLM"),
    _decoder("qwen3 (norms per head)", "Qwen3ForCausalLM", head_dim=8),
    _decoder("gemma2", "Gemma2ForCausalLM", head_dim=8),
    _decoder("phi3", "Phi3ForCausalLM"),
    _decoder("olmo2", "Olmo2ForCausalLM"),
    _decoder("opt", "OPTForCausalLM", ffn_dim=24, word_embed_proj_dim=16),
    transformer(
        "bloom",
        "text decoder",
        "BloomForCausalLM",
        _text,
        vocab_size=40,
        hidden_size=16,
        n_layer=2,
        n_head=2,
        use_cache=False,
    ),
    _decoder("falcon (parallel blocks)", "FalconForCausalLM", new_decoder_architecture=False),
)
_EXPERTS = (
    transformer(
        "mixtral",
        "mixture of experts",
        "MixtralForCausalLM",
        _text,
        **_DECODER,
        num_local_experts=3,
        num_experts_per_tok=2,
    ),
    transformer(
        "qwen3-moe",
        "mixture of experts",
        "Qwen3MoeForCausalLM",
        _text,
        **_DECODER,
        head_dim=8,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
    ),
    transformer(
        "switch transformers",
        "mixture of experts",
        "SwitchTransformersModel",
        _pair,
        **_T5,
        num_experts=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=0,
    ),
)
_RECURRENT = (
    transformer("mamba", "state space", "MambaForCausalLM", _text, **_STATE, state_size=4, expand=2, conv_kernel=3),
    transformer(
        "mamba2",
        "state space",
        "Mamba2ForCausalLM",
        _text,
        **_STATE,
        state_size=4,
        num_heads=4,
        head_dim=8,
        n_groups=1,
        chunk_size=4,
    ),
    transformer(
        "rwkv",
        "recurrent",
        "RwkvForCausalLM",
        _text,
        **_STATE,
        attention_hidden_size=16,
        intermediate_size=24,
        context_length=16,
    ),
    transformer(
        "recurrent gemma",
        "recurrent",
        "RecurrentGemmaForCausalLM",
        _text,
        **{**_DECODER, "num_hidden_layers": 3},
        lru_width=16,
        attention_window_size=8,
        block_types=["recurrent", "recurrent", "attention"],
    ),
    transformer(
        "xlstm",
        "recurrent",
        "xLSTMModel",
        _text,
        **_STATE,
        num_heads=2,
        num_blocks=2,
        embedding_dim=16,
        chunk_size=4,
        max_inference_chunksize=8,
    ),
)
_PAIRS = (
    transformer("t5 (shared embedding)", "encoder-decoder", "T5ForConditionalGeneration", _pair, **_T5),
    transformer("bart", "encoder-decoder", "BartForConditionalGeneration", _pair, **BART),
    transformer("marian", "encoder-decoder", "MarianMTModel", _pair, **BART),
    transformer("pegasus", "encoder-decoder", "PegasusModel", _pair, **BART),
)
HOSTS = (*_ENCODERS, *_DECODERS, *_EXPERTS, *_RECURRENT, *_PAIRS)
