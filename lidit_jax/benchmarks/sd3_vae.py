"""Config of the benchmarks' autoencoder, which has the widths of Stable Diffusion 3's."""

from lidit_jax.models.vae_config import VAEConfig

CONFIG = VAEConfig(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=16,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
