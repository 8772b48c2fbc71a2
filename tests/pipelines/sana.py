from pipelines.parts import CHARACTERS, randomise

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# merged, because the stock call's instruction has some 1500 characters; as in Gemma, a space is one token with what follows it
PAIRS = [*(("▁", b) for b in LETTERS), *((a, b) for a in LETTERS for b in "aeinorst")]
VOCABULARY = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *CHARACTERS, *map("".join, PAIRS)]


def tokenizer():
    from transformers import GemmaTokenizer

    vocab = {token: i for i, token in enumerate(VOCABULARY)}
    return GemmaTokenizer(vocab=vocab, merges=PAIRS, add_bos_token=True)


def text_encoder():
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=len(VOCABULARY), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, attn_logit_softcapping=None,
        pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return randomise(Gemma2Model(config))


def autoencoder():
    from diffusers import AutoencoderDC

    widths = (4, 8, 8, 8)
    vae = AutoencoderDC(
        latent_channels=4, encoder_block_out_channels=widths, decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * 4, decoder_layers_per_block=(1,) * 4, attention_head_dim=8,
        encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",), decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",),
        encoder_qkv_multiscales=((), (), (), (5,)), decoder_qkv_multiscales=((), (), (), (5,)),
        upsample_block_type="interpolate", scaling_factor=0.41407,
    )  # fmt: skip
    return randomise(vae)


def pipeline():
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    transformer = SanaTransformer2DModel(
        sample_size=4, patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16, timestep_scale=0.5,
    )  # fmt: skip
    return SanaPipeline(
        transformer=randomise(transformer), vae=autoencoder(), tokenizer=tokenizer(), text_encoder=text_encoder(),
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )  # fmt: skip
