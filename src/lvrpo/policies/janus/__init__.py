"""Janus (arXiv:2501.17811) of ``transformers``: a Llama that reads through SigLIP and draws VQ tokens in order."""
