from pipelines.parts import autoencoder, clip_text, clip_tokenizer, randomise, t5_encoder, t5_tokenizer


def without_t5():
    """As many folders have it, and the stock pipeline: zeros stand for T5's text."""
    pipe = pipeline()
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    return pipe


def pipeline():
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, pos_embed_max_size=8, qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=randomise(transformer), vae=autoencoder(scaling_factor=1.5, shift_factor=0.06),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip_text(1, projected=True), text_encoder_2=clip_text(2, projected=True), text_encoder_3=t5_encoder(),
        tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), tokenizer_3=t5_tokenizer(),
    )  # fmt: skip
