from pipelines.parts import autoencoder, clip_text, clip_tokenizer, randomise


def without_first_encoder():
    """As the refiner's encoders: the stock pipeline draws with the second one alone, to whose width the network is made."""
    pipe = pipeline(width=16)
    pipe.register_modules(text_encoder=None, tokenizer=None)
    return pipe


def pipeline(width=32):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width, attention_head_dim=(1, 2), transformer_layers_per_block=(1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=16 + 6 * 4,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    return StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13), unet=randomise(unet), scheduler=scheduler,
        text_encoder=clip_text(1), text_encoder_2=clip_text(2, projected=True), tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(),
        add_watermarker=False,
    )  # fmt: skip
