from pipelines.parts import autoencoder, clip_text, clip_tokenizer, randomise


def network(**changed):
    from diffusers import UNet2DConditionModel

    settings = dict(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8,
    )  # fmt: skip
    return UNet2DConditionModel(**settings | changed)


def scheduler(prediction="v_prediction"):
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type=prediction, rescale_betas_zero_snr=prediction == "v_prediction",
        timestep_spacing="trailing", clip_sample=False, steps_offset=1,
    )  # fmt: skip


def pipeline():
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=autoencoder(), unet=randomise(network()), text_encoder=clip_text(), tokenizer=clip_tokenizer(), scheduler=scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
