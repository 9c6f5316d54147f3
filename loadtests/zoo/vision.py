"""Networks over images, video, and images with text, from the `transformers` library."""

from __future__ import annotations

from typing import Any

import torch

from loadtests.zoo._host import Host, images, numbers, transformer

__all__ = ["HOSTS"]

_VIT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 32,
    "patch_size": 8,
}
_TEXT: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _captioned(generator: torch.Generator) -> dict[str, Any]:
    return {
        "input_ids": torch.randint(3, 40, (2, 6), generator=generator),
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
    }


def _convolutional(name: str, model: str, *, size: int = 32, **options: Any) -> Host:
    return transformer(name, "convolutional", model, images(size=size), **options)


_STAGES: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 2]}
_PYRAMID: dict[str, Any] = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [4, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
}
_RESNET = ("ResNetConfig", {**_STAGES, "hidden_sizes": [8, 8, 12, 12], "depths": [1, 1, 1, 1], "layer_type": "basic"})
_DETR: dict[str, Any] = {
    "backbone_config": ("ResNetConfig", {**_RESNET[1], "out_features": ["stage4"]}),
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_queries": 3,
}

_CONVOLUTIONS = (
    _convolutional("resnet", "ResNetForImageClassification", **_STAGES, layer_type="basic"),
    _convolutional("regnet", "RegNetModel", **_STAGES, groups_width=4),
    _convolutional("convnext", "ConvNextForImageClassification", hidden_sizes=[8, 12], depths=[1, 2], num_stages=2),
    _convolutional("convnextv2", "ConvNextV2Model", hidden_sizes=[8, 12], depths=[1, 1], num_stages=2),
    _convolutional(
        "mobilenet-v2", "MobileNetV2ForImageClassification", depth_multiplier=0.15, min_depth=4, image_size=32
    ),
    _convolutional(
        "efficientnet",
        "EfficientNetModel",
        image_size=32,
        width_coefficient=0.25,
        depth_coefficient=0.5,
        hidden_dim=320,
        kernel_sizes=[3, 3],
        in_channels=[16, 16],
        out_channels=[16, 24],
        depthwise_padding=[],
        strides=[1, 2],
        num_block_repeats=[1, 2],
        expand_ratios=[1, 2],
    ),
    _convolutional(
        "poolformer",
        "PoolFormerModel",
        hidden_sizes=[8, 12],
        depths=[1, 1],
        num_encoder_blocks=2,
        patch_sizes=[7, 3],
        strides=[4, 2],
        padding=[2, 1],
    ),
    _convolutional(
        "bit (group norm, weight standardised)",
        "BitModel",
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        num_groups=4,
        layer_type="preactivation",
    ),
)
_TRANSFORMERS = (
    transformer("vit", "vision transformer", "ViTForImageClassification", images(), **_VIT),
    transformer("deit", "vision transformer", "DeiTForImageClassification", images(), **_VIT),
    transformer("beit", "vision transformer", "BeitModel", images(), **_VIT),
    transformer("dinov2", "vision transformer", "Dinov2Model", images(), **_VIT),
    transformer(
        "vit-mae",
        "vision transformer",
        "ViTMAEForPreTraining",
        images(),
        **_VIT,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=24,
    ),
    transformer(
        "swin",
        "vision transformer",
        "SwinForImageClassification",
        images(),
        image_size=32,
        patch_size=2,
        embed_dim=8,
        depths=[1, 2],
        num_heads=[1, 2],
        window_size=4,
    ),
    transformer(
        "swinv2",
        "vision transformer",
        "Swinv2Model",
        images(),
        image_size=32,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[1, 2],
        window_size=4,
    ),
    transformer(
        "pvt",
        "vision transformer",
        "PvtModel",
        images(),
        image_size=32,
        **{**_PYRAMID, "patch_sizes": [4, 2], "sequence_reduction_ratios": [2, 1]},
    ),
    transformer(
        "segformer", "segmentation", "SegformerForSemanticSegmentation", images(), **_PYRAMID, decoder_hidden_size=16
    ),
    transformer(
        "mobilevit",
        "vision transformer",
        "MobileViTModel",
        images(),
        image_size=32,
        hidden_sizes=[8, 12, 16],
        neck_hidden_sizes=[4, 4, 8, 8, 12, 16, 16],
        num_attention_heads=2,
    ),
    transformer(
        "cvt",
        "vision transformer",
        "CvtModel",
        images(),
        embed_dim=[8, 8, 16],
        num_heads=[1, 1, 2],
        depth=[1, 2, 3],
        mlp_ratio=[2.0, 2.0, 2.0],
    ),
    transformer(
        "focalnet",
        "vision transformer",
        "FocalNetModel",
        images(),
        image_size=32,
        embed_dim=8,
        depths=[1, 1],
        hidden_sizes=[8, 16],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
    ),
)
_VIDEO = (
    transformer(
        "videomae (3-d patches)",
        "video",
        "VideoMAEForVideoClassification",
        numbers("pixel_values", 2, 4, 3, 16, 16),
        **{**_VIT, "image_size": 16},
        num_frames=4,
        tubelet_size=2,
    ),
    transformer(
        "timesformer",
        "video",
        "TimesformerModel",
        numbers("pixel_values", 2, 4, 3, 16, 16),
        **{**_VIT, "image_size": 16},
        num_frames=4,
    ),
)
_WITH_TEXT = (
    transformer(
        "clip", "image and text", "CLIPModel", _captioned, text_config=_TEXT, vision_config=_VIT, projection_dim=8
    ),
    transformer("siglip", "image and text", "SiglipModel", _captioned, text_config=_TEXT, vision_config=_VIT),
    transformer("vilt", "image and text", "ViltModel", _captioned, **{**_TEXT, **_VIT}),
    transformer(
        "blip",
        "image and text",
        "BlipModel",
        _captioned,
        text_config={**_TEXT, "encoder_hidden_size": 16},
        vision_config=_VIT,
        projection_dim=8,
    ),
)
_DETECTION = (
    transformer(
        "detr",
        "detection",
        "DetrForObjectDetection",
        images(),
        **_DETR,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
    ),
    transformer(
        "conditional detr",
        "detection",
        "ConditionalDetrModel",
        images(),
        **_DETR,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
    ),
    transformer(
        "yolos",
        "detection",
        "YolosForObjectDetection",
        images(),
        **{**_VIT, "image_size": [32, 32]},
        num_detection_tokens=3,
    ),
    transformer(
        "dpt",
        "segmentation",
        "DPTForSemanticSegmentation",
        images(),
        **{**_VIT, "num_hidden_layers": 4},
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        is_hybrid=False,
        num_labels=4,
        reassemble_factors=[4, 2, 1, 0.5],
    ),
)

HOSTS = (*_CONVOLUTIONS, *_TRANSFORMERS, *_VIDEO, *_WITH_TEXT, *_DETECTION)
