from pipelines.parts import qwen_tokenizer, randomise


def text_encoder(width=16):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 128, "hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width, "fullatt_block_indexes": [0],
    }  # fmt: skip
    special = dict.fromkeys(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), 127)
    return randomise(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special)))


def pipeline():
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[-0.7, 0.1, 0.5, 0.0], latents_std=[2.8, 1.4, 0.6, 1.0],
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192, shift_terminal=0.02
    )
    return QwenImagePipeline(
        transformer=randomise(transformer), vae=randomise(vae), scheduler=scheduler,
        text_encoder=text_encoder(), tokenizer=qwen_tokenizer(),
    )  # fmt: skip


def guided(conditional, unconditional, guidance):
    """Guidance, and then each token (B, n, F) scaled to the norm that the conditional prediction has there."""
    plain = unconditional + guidance * (conditional - unconditional)
    return plain * conditional.norm(dim=-1, keepdim=True) / plain.norm(dim=-1, keepdim=True)
