from pipelines.parts import autoencoder, qwen_tokenizer, randomise


def text_encoder(width=16):
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=128, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, max_position_embeddings=512,
    )  # fmt: skip
    return randomise(Qwen3Model(config))


def pipeline():
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 2, 2],
        axes_lens=[1024, 256, 264],
    )  # fmt: skip
    return ZImagePipeline(
        transformer=randomise(transformer), vae=autoencoder(scaling_factor=0.36, shift_factor=0.12),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), text_encoder=text_encoder(), tokenizer=qwen_tokenizer(),
    )  # fmt: skip
