"""Tiny random pipelines of every family, made offline, tokenizers included. A family is one file and one line here."""

from pipelines import flux, flux2, pixart, sana, sd, sd3, sdxl

# pipeline class -> maker
PIPELINES = {
    "StableDiffusionPipeline": sd.pipeline,
    "StableDiffusionXLPipeline": sdxl.pipeline,
    "StableDiffusion3Pipeline": sd3.pipeline,
    "FluxPipeline": flux.pipeline,
    "Flux2KleinPipeline": flux2.pipeline,
    "SanaPipeline": sana.pipeline,
    "PixArtSigmaPipeline": pixart.pipeline,
}
