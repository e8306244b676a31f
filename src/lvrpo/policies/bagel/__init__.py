"""BAGEL (arXiv:2505.14683): the Mixture-of-Transformers core with SigLIP-2, FLUX's autoencoder and Qwen's tokenizer."""
