from pipelines.parts import autoencoder, randomise, t5_encoder, t5_tokenizer


def pipeline():
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, out_channels=8, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, caption_channels=32, norm_num_groups=4, use_additional_conditions=False,
    )  # fmt: skip
    return PixArtSigmaPipeline(
        transformer=randomise(transformer), vae=autoencoder(scaling_factor=0.13), tokenizer=t5_tokenizer(), text_encoder=t5_encoder(),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )  # fmt: skip
