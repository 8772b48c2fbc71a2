"""Tiny random pipelines of every family, made offline, tokenizers included. A family is one file and one line here."""

from pipelines import flux, flux2, pixart, qwen_image, sana, sd, sd3, sdxl, z_image

# pipeline class -> maker
PIPELINES = {
    "StableDiffusionPipeline": sd.pipeline,
    "StableDiffusionXLPipeline": sdxl.pipeline,
    "StableDiffusion3Pipeline": sd3.pipeline,
    "FluxPipeline": flux.pipeline,
    "Flux2KleinPipeline": flux2.pipeline,
    "SanaPipeline": sana.pipeline,
    "PixArtSigmaPipeline": pixart.pipeline,
    "ZImagePipeline": z_image.pipeline,
    "QwenImagePipeline": qwen_image.pipeline,
}
# as PIPELINES, with parts missing that the stock pipeline does without
INCOMPLETE = {
    "StableDiffusion3Pipeline-without-T5": sd3.without_t5,
    "StableDiffusionXLPipeline-without-first-encoder": sdxl.without_first_encoder,
}
# pipeline class -> how it combines (conditional, unconditional, guidance) in its own layout, where that is not plain guidance
GUIDED = {"QwenImagePipeline": qwen_image.guided}
