"""Networks over text, sound and series, from the `transformers` library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from loadtests.zoo._host import Host, numbers, tokens, transformer

if TYPE_CHECKING:
    from loadtests.zoo._host import Batch

__all__ = ["HOSTS"]

_SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
_DECODER: dict[str, Any] = {
    **_SMALL,
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
_BART: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "use_cache": False,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
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
_CONVOLVED = {"conv_dim": [16, 16], "conv_kernel": [8, 4], "conv_stride": [4, 4], "num_conv_pos_embeddings": 4}
_SPEECH: dict[str, Any] = {**_SMALL, **_CONVOLVED, "num_feat_extract_layers": 2, "num_conv_pos_embedding_groups": 2}

_text, _pair = tokens("input_ids"), tokens("input_ids", "decoder_input_ids")


def _whisper(generator: torch.Generator) -> dict[str, Any]:
    return {
        "input_features": torch.randn(2, 8, 32, generator=generator),
        "decoder_input_ids": torch.randint(3, 40, (2, 5), generator=generator),
    }


def _decision(generator: torch.Generator) -> dict[str, Any]:
    return {
        "states": torch.randn(2, 4, 5, generator=generator),
        "actions": torch.randn(2, 4, 3, generator=generator),
        "rewards": torch.randn(2, 4, 1, generator=generator),
        "returns_to_go": torch.randn(2, 4, 1, generator=generator),
        "timesteps": torch.arange(4).repeat(2, 1),
        "attention_mask": torch.ones(2, 4, dtype=torch.long),
    }


def _series(generator: torch.Generator) -> dict[str, Any]:
    past, future = torch.randn(2, 15, 1, generator=generator), torch.randn(2, 4, 1, generator=generator)
    return {
        "past_values": torch.randn(2, 15, generator=generator),
        "past_time_features": past,
        "past_observed_mask": torch.ones(2, 15),
        "future_values": torch.randn(2, 4, generator=generator),
        "future_time_features": future,
    }


_FORECAST: dict[str, Any] = {
    "prediction_length": 4,
    "context_length": 8,
    "lags_sequence": [1, 2, 7],
    "num_time_features": 1,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "use_cache": False,
}


def _encoder(name: str, model: str, draw: Batch = _text, **options: Any) -> Host:
    return transformer(name, "text encoder", model, draw, **{**_SMALL, **options})


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
    transformer("bart", "encoder-decoder", "BartForConditionalGeneration", _pair, **_BART),
    transformer("marian", "encoder-decoder", "MarianMTModel", _pair, **_BART),
    transformer("pegasus", "encoder-decoder", "PegasusModel", _pair, **_BART),
    transformer(
        "whisper",
        "speech",
        "WhisperForConditionalGeneration",
        _whisper,
        **_BART,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
    ),
)
_SOUNDS = (
    transformer("wav2vec2", "speech", "Wav2Vec2Model", numbers("input_values", 2, 256), **_SPEECH, mask_time_prob=0.0),
    transformer("hubert", "speech", "HubertModel", numbers("input_values", 2, 256), **_SPEECH, mask_time_prob=0.0),
    transformer(
        "audio spectrogram transformer",
        "speech",
        "ASTForAudioClassification",
        numbers("input_values", 2, 32, 16),
        **{k: v for k, v in _SMALL.items() if k not in {"vocab_size", "max_position_embeddings", "pad_token_id"}},
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        max_length=32,
        num_mel_bins=16,
    ),
    transformer(
        "encodec",
        "speech",
        "EncodecModel",
        numbers("input_values", 2, 1, 320),
        num_filters=4,
        hidden_size=8,
        upsampling_ratios=[4, 4],
        num_lstm_layers=1,
        codebook_size=16,
        codebook_dim=8,
        target_bandwidths=[12.0],
    ),
)
_SERIES = (
    transformer(
        "patchtst",
        "time series",
        "PatchTSTForPrediction",
        numbers("past_values", 2, 16, 3),
        num_input_channels=3,
        context_length=16,
        prediction_length=4,
        patch_length=4,
        patch_stride=4,
        d_model=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        ffn_dim=24,
    ),
    transformer(
        "patchtsmixer",
        "time series",
        "PatchTSMixerForPrediction",
        numbers("past_values", 2, 16, 3),
        num_input_channels=3,
        context_length=16,
        prediction_length=4,
        patch_length=4,
        patch_stride=4,
        d_model=16,
        num_layers=2,
    ),
    transformer("time series transformer", "time series", "TimeSeriesTransformerModel", _series, **_FORECAST),
    transformer("autoformer", "time series", "AutoformerModel", _series, **_FORECAST, moving_average=3, label_length=2),
    transformer(
        "decision transformer",
        "reinforcement learning",
        "DecisionTransformerModel",
        _decision,
        state_dim=5,
        act_dim=3,
        hidden_size=16,
        max_ep_len=16,
        n_layer=1,
        n_head=2,
        n_positions=32,
        use_cache=False,
    ),
)

HOSTS = (*_ENCODERS, *_DECODERS, *_EXPERTS, *_RECURRENT, *_PAIRS, *_SOUNDS, *_SERIES)
