"""Networks over sound, series and trajectories, from the `transformers` library."""

from __future__ import annotations

from typing import Any

import torch

from loadtests.zoo._host import BART, SMALL, numbers, transformer

__all__ = ["HOSTS"]

_CONVOLVED = {"conv_dim": [16, 16], "conv_kernel": [8, 4], "conv_stride": [4, 4], "num_conv_pos_embeddings": 4}
_SPEECH: dict[str, Any] = {**SMALL, **_CONVOLVED, "num_feat_extract_layers": 2, "num_conv_pos_embedding_groups": 2}

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


_SOUNDS = (
    transformer(
        "whisper",
        "speech",
        "WhisperForConditionalGeneration",
        _whisper,
        **BART,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
    ),
    transformer("wav2vec2", "speech", "Wav2Vec2Model", numbers("input_values", 2, 256), **_SPEECH, mask_time_prob=0.0),
    transformer("hubert", "speech", "HubertModel", numbers("input_values", 2, 256), **_SPEECH, mask_time_prob=0.0),
    transformer(
        "audio spectrogram transformer",
        "speech",
        "ASTForAudioClassification",
        numbers("input_values", 2, 32, 16),
        **{k: v for k, v in SMALL.items() if k not in {"vocab_size", "max_position_embeddings", "pad_token_id"}},
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


HOSTS = (*_SOUNDS, *_SERIES)
