from pipelines.parts import autoencoder, clip_text, clip_tokenizer, randomise, t5_encoder, t5_tokenizer


def pipeline(*, guidance_embeds=True, t5_width=32):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=t5_width,
        pooled_projection_dim=16, axes_dims_rope=(2, 2, 4), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    return FluxPipeline(
        transformer=randomise(transformer), vae=autoencoder(scaling_factor=1.5, shift_factor=0.06),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        text_encoder=clip_text(1), text_encoder_2=t5_encoder(width=t5_width), tokenizer=clip_tokenizer(), tokenizer_2=t5_tokenizer(),
    )  # fmt: skip
