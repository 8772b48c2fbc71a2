"""Parts that several families share: byte-level tokenizers, tiny text encoders and autoencoders, weights that are not at their zeros."""

import torch

CHARACTERS = [chr(c) for c in range(33, 127)]


def randomise(module, seed=0, scale=0.2):
    """Every parameter drawn anew: fresh networks have zeros (gates, last layers) behind which nothing can be told apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * fan**-0.5 if parameter.ndim > 1 else scale * noise + (parameter == 1))
    return module.eval()


def clip_tokenizer(length=16):
    from transformers import CLIPTokenizer

    vocab = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *CHARACTERS, *[c + "</w>" for c in CHARACTERS]])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=length)


def t5_tokenizer(length=512):
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in CHARACTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def qwen_tokenizer():
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate([*special, *CHARACTERS, "Ġ", "Ċ"])}  # the last two: space and line break
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\nSay {{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{% if not enable_thinking %}<think>{% endif %}"
    )
    return Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=special[1:], chat_template=template)


def clip_text(seed=0, *, width=16, projected=False, length=16):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=2 + 2 * len(CHARACTERS), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=length, bos_token_id=0, eos_token_id=1, pad_token_id=1, projection_dim=width,
    )  # fmt: skip
    return randomise((CLIPTextModelWithProjection if projected else CLIPTextModel)(config), seed)


def t5_encoder(seed=0, *, width=32):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=4 + len(CHARACTERS), d_model=width, d_kv=8, d_ff=width, num_layers=1, num_heads=width // 8,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return randomise(T5EncoderModel(config), seed)


def autoencoder(channels=4, **config):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1, latent_channels=channels, norm_num_groups=4, sample_size=8, **config,
    )  # fmt: skip
    return randomise(vae)
